"""How the cost of both stages grows with positions, samples and workers: measured, fitted, and checked.

python bench/growth.py                   about 15 minutes on two CPU cores
python bench/growth.py --size full       a GPU with 80 GB, one size after the other
python bench/growth.py --quick           a smoke test with tiny models
python bench/growth.py --join 1000000    what a data set of so many made-up samples holds in memory

`stage 1` is that of bench/stage1.py, shard to part with all targets; `stage 2` is `cached` of bench/stage2.py, a step
with every loss and its batches in memory, or `loading`, the same with batches from shards and store, where samples
or data-loading workers are varied. Every size has a process of its own, and they take turns. Each law is fitted to
the medians, once with every size and once without the largest, which it must then predict. GFLOP/s are operations
counted from shapes (bench/flops.py) over the median: where they stay the same, time grows as operations do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from growth_work import Point, prepare, work_of
from join_memory import described_join, join_memory
from laws import Law, error_at_the_largest, fit
from side_by_side import Turns, measure, save, take_turns


@dataclass(frozen=True)
class Plan:
    """Sizes to be measured. `together`: a sweep's processes stand side by side; else each has the machine alone."""

    tokens: tuple[int, ...]
    batch_size: int
    samples: tuple[int, ...]
    capture_workers: tuple[int, ...]  # processes of stage 1, with a thread each
    loading_workers: tuple[int, ...]  # data-loading workers of stage 2
    shared_samples: int  # that the workers share out
    shared_tokens: int
    repeats: int
    together: bool = True


PLANS = {
    "tiny": Plan((190, 320), 2, (), (2,), (1,), 4, 200, repeats=1),
    "small": Plan((200, 400, 800, 1200, 1600), 4, (8, 24, 48, 96), (1, 2), (0, 1, 2), 32, 300, repeats=5),
    "full": Plan(
        (200, 400, 800, 1200, 1600), 4, (32, 96, 192, 384), (), (0, 1, 2, 4, 8), 64, 300, 5, together=False
    ),
}


@dataclass(frozen=True)
class Sweep:
    """One thing varied, all else left. `laws`: a cost's name -> the size it grows with, and the powers of it."""

    name: str
    varied: str
    points: tuple[Point, ...]
    laws: Mapping[str, tuple[str, tuple[int, ...]]]


def sweeps(plan: Plan) -> Iterator[Sweep]:
    """In the order in which they are measured."""
    square = {"seconds_a_sample": ("positions", (0, 1, 2)), "peak_bytes": ("positions", (0, 1, 2))}
    stored = {"store_bytes_a_sample": ("text_rows", (0, 1))}
    linear = {"seconds": ("samples", (0, 1)), "peak_bytes": ("samples", (0, 1))}
    base = Point("stage 1", plan.tokens[0], plan.batch_size, plan.batch_size)
    by_tokens = tuple(replace(base, tokens=tokens) for tokens in plan.tokens)
    by_samples = tuple(replace(base, samples=samples) for samples in plan.samples)
    shared = replace(base, tokens=plan.shared_tokens, samples=plan.shared_samples)
    yield Sweep("stage 1 against positions", "positions", by_tokens, square | stored)
    yield Sweep("stage 2 against positions", "positions", _as("cached", by_tokens), square)
    yield Sweep("stage 1 against samples", "samples", by_samples, linear)
    yield Sweep(
        "stage 2 against samples, batches from the store", "samples", _as("loading", by_samples), linear
    )
    capturing = tuple(replace(shared, workers=workers) for workers in plan.capture_workers)
    yield Sweep("stage 1 against processes of one thread each", "workers", _as("workers", capturing), {})
    loading = tuple(replace(shared, workers=workers) for workers in plan.loading_workers)
    yield Sweep("stage 2 against data-loading workers", "workers", _as("loading", loading), {})


def _as(work: str, points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple(replace(point, work=work) for point in points)


def main() -> int:
    options = _options()
    if options.contestant:
        take_turns(work_of(__file__, Point.parse(options.contestant), options))
        return 0
    if options.join:
        found = join_memory(options.join)
        print(described_join(found))
        save([], options.output, join=found)
        return 0
    size = "tiny" if options.quick else options.size
    plan = PLANS[size] if options.repeats is None else replace(PLANS[size], repeats=options.repeats)
    results, all_turns = [], []
    with tempfile.TemporaryDirectory() as folder:
        for sweep in sweeps(plan):
            if sweep.points and (not options.only or options.only in sweep.name):
                turns = _measured(sweep, plan, size, Path(folder))
                all_turns += turns
                results.append(result(sweep, turns))
                print("\n".join(described(results[-1])), flush=True)
    save(all_turns, options.output, size=size, plan=asdict(plan), sweeps=results)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=list(PLANS), default="small")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, one turn each: figures mean nothing"
    )
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", help="sweeps whose name has these words")
    parser.add_argument("--join", type=int, metavar="SAMPLES", help="memory of a data set, and nothing else")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/growth.json"))
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(sweep: Sweep, plan: Plan, size: str, folder: Path) -> list[Turns]:
    for point in sweep.points:
        prepare(point, size, folder)
    names = [point.name for point in sweep.points]
    groups = [names] if plan.together else [[name] for name in names]
    arguments = [f"--size={size}", f"--folder={folder}"]
    return [
        turns
        for group in groups
        for turns in measure(__file__, group, repeats=plan.repeats, arguments=arguments)
    ]


def result(sweep: Sweep, turns: Sequence[Turns]) -> dict[str, Any]:
    """A sweep's rows, and its laws, with what each says of the largest size without having seen it."""
    rows = [_row(sweep, point, of) for point, of in zip(sweep.points, turns, strict=True)]
    laws = {}
    for cost, (size, powers) in sweep.laws.items():
        sizes, costs = ([row[name] for row in rows] for name in (size, cost))
        law = fit(sizes, costs, powers)
        error = error_at_the_largest(sizes, costs, powers[: len(sizes) - 1])
        laws[cost] = {"size": size, **asdict(law), "error_at_the_largest": error, "text": law.text(size)}
    return {"name": sweep.name, "varied": sweep.varied, "rows": rows, "laws": laws}


def _row(sweep: Sweep, point: Point, turns: Turns) -> dict[str, Any]:
    samples, counted = turns.counted["samples"], turns.counted
    return {
        **asdict(point),
        **{
            name: counted[name]
            for name in ("positions", "text_rows", "answers", "flops", "startup_cpu_seconds")
            if name in counted
        },
        "samples": samples,
        "seconds": turns.median_seconds,
        "seconds_a_sample": turns.median_seconds / samples,
        "least_and_greatest": [end(turns.seconds) / samples for end in (min, max)],
        "peak_bytes": counted.get("peak_bytes", turns.peak_bytes),
        **({"store_bytes_a_sample": counted["bytes"] / samples} if "bytes" in counted else {}),
        **({"waiting": counted["waiting"]} if "waiting" in counted else {}),
    }


UNITS = {
    "seconds": ("seconds", 1.0),
    "seconds_a_sample": ("milliseconds a sample", 1e3),
    "peak_bytes": ("peak MB", 1e-6),
    "store_bytes_a_sample": ("kB a sample in the store", 1e-3),
}


def described(found: Mapping[str, Any]) -> Iterator[str]:
    """A sweep as text: its sizes, then its laws."""
    rows, varied = found["rows"], found["varied"]
    yield f"\n{found['name']}"
    yield f"{varied:>10}  ms a sample    min..max ms      of the first  peak MB  GFLOP/s  start-up CPU s  waiting"
    for row in rows:
        low, high = (1e3 * end for end in row["least_and_greatest"])
        startup = f"{row['startup_cpu_seconds']:14.1f}" if "startup_cpu_seconds" in row else f"{'-':>14}"
        rate = f"{row['flops'] / row['seconds_a_sample'] / 1e9:7.1f}" if "flops" in row else f"{'-':>7}"
        waiting = f"{row['waiting']:7.1%}" if "waiting" in row else f"{'-':>7}"
        yield (
            f"{row[varied]:10.0f}  {1e3 * row['seconds_a_sample']:11.1f}  {low:7.1f}..{high:<8.1f}  "
            f"{row['seconds_a_sample'] / rows[0]['seconds_a_sample']:13.2f}  {row['peak_bytes'] / 1e6:7.0f}  "
            f"{rate}  {startup}  {waiting}"
        )
    for cost, law in found["laws"].items():
        unit, scale = UNITS[cost]
        formula = Law(law["powers"], law["coefficients"], law["residual"]).text(law["size"], scale=scale)
        yield (
            f"{unit} = {formula}; at most {law['residual']:.1%} off; without the largest it is "
            f"predicted {law['error_at_the_largest']:+.1%}"
        )


if __name__ == "__main__":
    sys.exit(main())
