"""MobileVLM V2's 3.7 million samples, on paper: operations, bytes, hours and money of every way to distil.

python bench/profiles.py                     measures the bytes of a sample first
python bench/extrapolate.py

Arithmetic alone: nothing here is timed. Operations are counted from the shapes (bench/flops.py). Hours are operations
over a published peak times an assumed utilisation, money is hours times an assumed price; each assumption is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from flops import VISION_TOKENS, Model, Sample, online, stage_1, stage_2, stub
from profiles import PROFILES, STEPS, reference_bytes
from random_models import MODELS
from reading_samples import SIZES

from cache.format.codecs import stored_arrays

NUM_SAMPLES = {"pretrain": 1_246_000, "finetune": 2_428_000}
RUNS = (1, 2, 5, 10)
# What the authors of MobileVLM V2 report of their own training without a teacher: 8 A100 for so many hours.
PUBLISHED_GPU_HOURS = (8 * (3 + 9), 8 * (5 + 12))


@dataclass(frozen=True)
class Gpu:
    """A peak as published for dense bfloat16, and a price that is assumed."""

    name: str
    peak_flops: float
    dollars_an_hour: float


@dataclass(frozen=True)
class Assumptions:
    """What no measurement of ours supports."""

    gpus: tuple[Gpu, ...] = (Gpu("A100 80 GB", 312e12, 2.0), Gpu("H100 SXM", 989e12, 3.0))
    utilisations: tuple[float, float] = (0.3, 0.5)
    stage_1_overhead: float = 1.05
    dollars_a_terabyte_month: float = 23.0
    months: float = 3.0

    def lines(self) -> Iterator[str]:
        """Each in a sentence."""
        low, high = self.utilisations
        for gpu in self.gpus:
            yield f"{gpu.name}: {gpu.peak_flops / 1e12:.0f} TFLOP/s (published), ${gpu.dollars_an_hour:.2f} an hour"
        yield f"utilisation of that peak, teacher and student alike: {low:.0%} to {high:.0%}; none measured on a GPU"
        yield f"stage 1 takes {self.stage_1_overhead:.2f} of its operations' time (the project's bar)"
        yield f"a store costs ${self.dollars_a_terabyte_month:.0f} a TB and month, and is kept {self.months:g} months"
        for name, step in STEPS.items():
            yield (
                f"{name}: {NUM_SAMPLES[name] / 1e6:.3f} M samples, each with one image and of mean length: "
                f"{_sample(name).positions} positions, {step.text_rows} rows of text, {step.answers} answers"
            )
        yield "one epoch of each step, as published; every image distinct (COCO's are not: less to store)"
        yield "student: gradient checkpointing on, as the shipped configs have it, unless said otherwise"


Ways = Mapping[str, Callable[[Sample], float]]


def ways(teacher: Model, student: Model) -> Ways:
    """Operations a sample of everything that may be run."""
    return {
        "stage 1, all targets": lambda s: stage_1(teacher, s),
        "stub: attention, vision": lambda s: stub(teacher, s),
        "stub, tower shared": lambda s: stub(teacher, s, with_tower=False),
        "stage 2": lambda s: stage_2(student, s, checkpointing=True),
        "stage 2, no checkpoints": lambda s: stage_2(student, s, checkpointing=False),
        "teacher in the step": lambda s: online(teacher, student, s, checkpointing=True),
    }


def _sample(step: str) -> Sample:
    of = STEPS[step]
    return Sample(of.positions_before + VISION_TOKENS + of.text_rows, of.text_rows, of.answers)


def _models(size: str) -> tuple[Model, Model]:
    return Model.of(MODELS[size, "teacher"]), Model.of(MODELS[size, "student"])


def totals() -> dict[str, dict[str, float]]:
    """Operations of every way: a sample of each step, and all samples of both."""
    found = {}
    for name, count in ways(*_models("full")).items():
        each = {step: count(_sample(step)) for step in STEPS}
        found[name] = each | {"all": sum(each[step] * NUM_SAMPLES[step] for step in STEPS)}
    return found


def hours(operations: float, gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    """On one GPU, at the higher and at the lower utilisation."""
    low, high = assumed.utilisations
    return tuple(operations / gpu.peak_flops / share / 3600 for share in (high, low))  # type: ignore[return-value]


def stored_bytes(step: str, profile: str) -> float:
    """Codes of a sample before compression, exact for a sample of mean length."""
    of = STEPS[step]
    rows = {"R": of.text_rows, "I": 1, "P": of.answers, "S": of.positions_before + of.text_rows + 1}
    return sum(
        rows[spec.axes[0]] * prod(array.row_shape) * np.dtype(array.dtype).itemsize
        for spec in of.size(SIZES["full"], PROFILES[profile]).specs()
        for array in stored_arrays(spec)
    )


def compressed_bytes(row: Mapping[str, Any]) -> float:
    """Of a sample of mean length, from synthetic ones of bench/profiles.py, which chance made longer or shorter."""
    of = STEPS[row["step"]]
    longer = {"attention": of.text_rows / row["text_rows"], "logits": of.answers / row["answers"]}
    arrays = row["array_bytes_per_sample"]
    return row["other_bytes_per_sample"] + sum(
        size * longer.get(name.split("/")[0], 1.0) for name, size in arrays.items()
    )


def profile_bytes(file: Path) -> dict[str, dict[str, float]]:
    """By profile and step, measured on synthetic values; {} where bench/profiles.py has not run at full shapes."""
    record = json.loads(file.read_text()) if file.exists() else {"size": None}
    found: dict[str, dict[str, float]] = {}
    for row in record["rows"] if record["size"] == "full" else ():
        found.setdefault(row["profile"], {})[row["step"]] = compressed_bytes(row)
    return found


def break_even(*, saved: float, once: float) -> int:
    """Runs from which paying `once` is no dearer, where every run saves so much; both in one unit."""
    return max(1, ceil(once / saved))


def _operations(found: Mapping[str, Mapping[str, float]], assumed: Assumptions) -> Iterator[str]:
    names = "  ".join(f"{gpu.name + ', hours':>18}  {'dollars':>13}" for gpu in assumed.gpus)
    yield f"{'':<24} TFLOP a sample: pretrain  finetune  all, EFLOP  {names}"
    for name, of in found.items():
        figures = "  ".join(_hours_and_money(of["all"], gpu, assumed) for gpu in assumed.gpus)
        yield (
            f"{name:<24} {of['pretrain'] / 1e12:24.2f}  {of['finetune'] / 1e12:8.2f}  {of['all'] / 1e18:10.2f}  "
            f"{figures}"
        )


def _published(found: Mapping[str, Mapping[str, float]], assumed: Assumptions) -> str:
    """The utilisation that the authors' own hours come to, by our count of operations."""
    gpu, operations = assumed.gpus[0], found["stage 2"]["all"]
    few, many = PUBLISHED_GPU_HOURS
    low, high = (operations / gpu.peak_flops / 3600 / spent for spent in (many, few))
    return (
        f"CHECK  MobileVLM V2's authors report {few} to {many} A100 hours for the student alone: "
        f"{low:.0%} to {high:.0%} of the peak by these counts, and hours as many times longer as that is lower"
    )


def _rates(found: Mapping[str, Mapping[str, float]], each: float, assumed: Assumptions) -> Iterator[str]:
    """What the fastest assumed student asks of the disk."""
    operations = found["stage 2"]["all"] / sum(NUM_SAMPLES.values())
    for gpu in assumed.gpus:
        rate = gpu.peak_flops * assumed.utilisations[1] / operations
        yield (
            f"a student on one {gpu.name} at {assumed.utilisations[1]:.0%} reads {rate:.0f} samples a second: "
            f"{rate * each / 1e6:.0f} MB a second of the default profile"
        )


def _hours_and_money(operations: float, gpu: Gpu, assumed: Assumptions) -> str:
    few, many = hours(operations, gpu, assumed)
    dollars = f"{few * gpu.dollars_an_hour:,.0f}..{many * gpu.dollars_an_hour:,.0f}"
    return f"{f'{few:,.1f}..{many:,.1f}':>18}  {dollars:>13}"


def _bytes(measured: Mapping[str, Mapping[str, float]], assumed: Assumptions) -> Iterator[str]:
    columns = "kB: pretrain  finetune  all, TB"
    yield f"{'':<22} before compression, {columns}   compressed, {columns}"
    reference = {
        step: sum(reference_bytes(SIZES["full"], of.text_rows, of.positions_before).values())
        for step, of in STEPS.items()
    }
    yield "the reference computes" + _sizes(reference, 33)
    for profile in PROFILES:
        plain = {step: stored_bytes(step, profile) for step in STEPS}
        compressed = measured.get(profile)
        rest = _sizes(compressed, 26) if compressed else "   not measured: run python bench/profiles.py"
        yield f"{profile:<22}" + _sizes(plain, 33) + rest


def _sizes(each: Mapping[str, float], width: int) -> str:
    total = _total_bytes(each) / 1e12
    return f"{each['pretrain'] / 1e3:{width},.1f}  {each['finetune'] / 1e3:8,.1f}  {total:7.3f}"


def _total_bytes(each: Mapping[str, float]) -> float:
    return sum(each[step] * NUM_SAMPLES[step] for step in STEPS)


def _runs(
    found: Mapping[str, Mapping[str, float]], stores: Mapping[str, float], assumed: Assumptions
) -> Iterator[str]:
    """Dollars of N students, at the middle of the utilisations, on the first GPU; `stores` bytes by profile."""
    gpu, share = assumed.gpus[0], sum(assumed.utilisations) / 2
    dollar = gpu.dollars_an_hour / gpu.peak_flops / share / 3600
    teacher, student, again, shared = (
        found[name]["all"] * dollar
        for name in ("stage 1, all targets", "stage 2", "stub: attention, vision", "stub, tower shared")
    )
    once = {
        profile: teacher * assumed.stage_1_overhead
        + size / 1e12 * assumed.dollars_a_terabyte_month * assumed.months
        for profile, size in stores.items()
    }
    yield (
        f"{f'dollars of N students on {gpu.name} at {share:.0%}':<44}"
        + "".join(f"{f'N = {number}':>9}" for number in RUNS)
        + "  no dearer than the first from N ="
    )
    for name, first, each in (
        ("teacher in every step", 0.0, teacher + student),
        ("cache once: default", once["default"], student),
        ("cache once: small", once["small"], student),
        ("cache once: logits only, others recomputed", once["logits only"], student + again),
        ("the same, tower shared with the student", once["logits only"], student + shared),
    ):
        saved = teacher + student - each
        even = f"{break_even(saved=saved, once=first):5}" if first else "    -"
        yield f"{name:<44}" + "".join(f"{first + number * each:9,.0f}" for number in RUNS) + f"  {even}"


def floors() -> Iterator[str]:
    """Ratios of operations, below which no measured ratio can fall unless the two run at different speeds."""
    yield "size   positions   stub / stage 1   stage 2 / teacher in the step   the same, no checkpoints"
    for size, positions in (("small", 300), ("small", 1100), ("full", 300), ("full", 1100)):
        teacher, student = _models(size)
        rows = positions - STEPS["finetune"].positions_before - VISION_TOKENS
        sample = Sample(positions, rows, rows // 2)
        ratios = [
            stub(teacher, sample) / stage_1(teacher, sample),
            *(
                stage_2(student, sample, checkpointing=again)
                / online(teacher, student, sample, checkpointing=again)
                for again in (True, False)
            ),
        ]
        yield f"{size:<6} {positions:9}   {ratios[0]:14.3f}   {ratios[1]:29.3f}   {ratios[2]:24.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profiles", type=Path, default=Path("runs/bench/profiles.json"))
    parser.add_argument("--utilisation", type=float, nargs=2, metavar=("LOW", "HIGH"))
    options = parser.parse_args()
    assumed = Assumptions()
    if options.utilisation:
        assumed = replace(assumed, utilisations=tuple(options.utilisation))
    measured, found = profile_bytes(options.profiles), totals()
    stores = {
        profile: _total_bytes(measured.get(profile) or {step: stored_bytes(step, profile) for step in STEPS})
        for profile in PROFILES
    }
    print(*(f"ASSUMED  {line}" for line in assumed.lines()), sep="\n")
    print(
        "\nComputed from shapes; hours and money of one GPU for all samples of both steps, by assumption:\n"
    )
    print(*_operations(found, assumed), sep="\n")
    print("\n" + _published(found, assumed))
    print("\nBytes: before compression exact, compressed measured on synthetic values:\n")
    print(*_bytes(measured, assumed), sep="\n")
    print(*_rates(found, stores["default"] / sum(NUM_SAMPLES.values()), assumed), sep="\n")
    print("\nWays, by assumption:\n")
    print(*_runs(found, stores, assumed), sep="\n")
    print("\nFloors: ratios of operations, to hold measured ratios against:\n")
    print(*floors(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
