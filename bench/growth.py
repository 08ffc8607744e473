"""How the cost of both stages grows with positions, samples and workers: about 15 minutes on two CPU cores.

python -m bench.growth

`stage 1` is that of bench/stage1.py, `cached` and `loading` are those of bench/stage2.py. Each size has a process of
its own, and they take turns. Laws are fitted to the medians by least squares of relative errors. GFLOP/s are
operations counted from shapes (bench/flops.py) over the median: where they stay equal, time grows as operations do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
import typer
from numpy.polynomial import Polynomial

from bench import flops, stage1, stage2
from bench.models import Case, config_of, write_inputs
from bench.tables import print_table
from bench.turns import Turns, Work, machine, measure
from pipeline.data.preparation import Preparation
from pipeline.data.shards import Sample, expand_shards, read_shard
from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX

TOKENS, SAMPLES = (200, 400, 800, 1200, 1600), (8, 24, 48, 96)
FORMATS = {
    "ms a sample": ".1f", "least": ".1f", "most": ".1f", "of the first": ".2f", "peak MB": ".0f", "GFLOP/s": ".1f",
    "start-up CPU s": ".1f", "waiting": ".1%",
}  # fmt: skip
Row = Mapping[str, float]
Law = tuple[str, str, int]  # names of a cost and of what it grows with, and the highest power of that
app = typer.Typer(add_completion=False)


class Sweep(NamedTuple):
    """One thing varied, all else left as it is."""

    name: str
    varied: str
    work: Callable[[Case], Work]
    cases: Sequence[Case]
    laws: Sequence[Law] = ()


def sweeps(base: Case) -> Iterator[Sweep]:
    """The sweeps in their order, below the folder of `base`."""
    by_tokens = [replace(base, tokens=number) for number in TOKENS]
    by_samples = [replace(base, samples=number) for number in SAMPLES]
    by_workers = [replace(base, tokens=300, samples=32, workers=number) for number in (0, 1, 2)]
    square = ("ms a sample", "positions", 2), ("peak MB", "positions", 2)
    linear = ("seconds", "samples", 1), ("peak MB", "samples", 1)
    stored = ("stored kB a sample", "text_rows", 1)
    yield Sweep("stage 1 against positions", "positions", stage1.capturing, by_tokens, (*square, stored))
    yield Sweep("stage 2 against positions", "positions", stage2.cached, by_tokens, square)
    yield Sweep("stage 1 against samples", "samples", stage1.capturing, by_samples, linear)
    yield Sweep("stage 2 against samples, from the store", "samples", stage2.loading, by_samples, linear)
    yield Sweep("stage 2 against data-loading workers", "workers", stage2.loading, by_workers)


def rows_of(sweep: Sweep, *, repeats: int = 5) -> list[Row]:
    """Write what the sweep reads, run it, and return a row for each size."""
    cases = [_write(sweep, case) for case in sweep.cases]
    contestants = {f"{sweep.name}: {case}": partial(sweep.work, case) for case in cases}
    rows = [_row(sweep, case, of) for case, of in zip(cases, measure(contestants, repeats), strict=True)]
    return [row | {"of the first": row["ms a sample"] / rows[0]["ms a sample"]} for row in rows]


def _write(sweep: Sweep, case: Case) -> Case:
    """Write shards and models and, for stage 2, their store. Returns the case in a folder of its own."""
    case = replace(case, folder=case.folder / f"{sweep.name} {case.tokens} {case.samples} {case.workers}")
    case.folder.mkdir(parents=True)
    write_inputs(case, "teacher", "student")
    if sweep.work is not stage1.capturing:
        stage2.prepare(case)
    return case


def _row(sweep: Sweep, case: Case, turns: Turns) -> dict[str, float]:
    sample = mean_sample(case)
    is_stage_1 = sweep.work is stage1.capturing
    count = flops.stage_1 if is_stage_1 else partial(flops.stage_2, checkpointing=False)
    seconds = median(turns.seconds)
    found = {
        "positions": sample.positions,
        "text_rows": sample.text_rows,
        "samples": case.samples,
        "workers": case.workers,
        "seconds": seconds,
        "ms a sample": 1e3 * seconds / case.samples,
        "least": 1e3 * min(turns.seconds) / case.samples,
        "most": 1e3 * max(turns.seconds) / case.samples,
        "peak MB": turns.peak_bytes / 1e6,
        "GFLOP/s": count(case.size, sample) * case.samples / seconds / 1e9,
        "start-up CPU s": turns.startup_cpu_seconds,
        "stored kB a sample": turns.counted.get("bytes", 0) / case.samples / 1e3,
    }
    return found | turns.counted


def mean_sample(case: Case) -> flops.Sample:
    """The mean lengths of the case's samples."""
    config = config_of(case)
    preparation = Preparation.of(config.teacher.model, config.data)
    shards = expand_shards(config.data.shards)
    items = [item for shard in shards for item in read_shard(shard) if isinstance(item, Sample)]
    tokens = [preparation.tokenize(item.conversations) for item in items]
    ids = [of.input_ids for of in tokens]
    return flops.Sample(
        positions=round(mean(map(preparation.merged_length, ids))),
        text_rows=round(mean(len(of) - of.index(IMAGE_TOKEN_INDEX) - 1 for of in ids)),
        answers=round(mean(sum(label != IGNORE_INDEX for label in of.labels) for of in tokens)),
    )


def described(law: Law, rows: Sequence[Row]) -> str:
    """The law as a formula, and the largest of its relative errors."""
    cost, size, power = law
    sizes, costs = (np.array([row[name] for row in rows], dtype=float) for name in (size, cost))
    found = Polynomial.fit(sizes, costs, power, w=1 / costs, symbol=size).convert()
    with np.printoptions(precision=3):
        return f"{cost} = {found:ascii}; at most {np.abs(found(sizes) / costs - 1).max():.1%} off"


@app.command(help=__doc__.splitlines()[0])
def main() -> None:
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for sweep in sweeps(Case("small", TOKENS[0], samples=4, batch_size=4, folder=Path(folder))):
            rows = rows_of(sweep)
            names = [sweep.varied, *(name for name in FORMATS if name in rows[0])]
            print(f"\n{sweep.name}")
            print_table([{name: format(row[name], FORMATS.get(name, "d")) for name in names} for row in rows])
            print(*(described(law, rows) for law in sweep.laws), sep="\n", flush=True)


if __name__ == "__main__":
    app()
