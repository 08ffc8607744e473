"""MobileVLM V2's 3.7 million samples, on paper: operations, bytes, hours and money of every way to distil.

python -m bench.profiles                     measures the bytes of a sample first
python -m bench.extrapolate

Arithmetic alone: nothing here is timed. Operations are counted from the shapes (bench/flops.py). Hours are operations
over a published peak times an assumed utilisation, dollars are hours times an assumed price. Every image is taken as
distinct, every step as one epoch, gradient checkpointing as on unless it says otherwise.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
import typer

from bench.flops import VISION_TOKENS, Lengths, online, stage_1, stage_2, stub
from bench.profiles import FIGURES, PROFILES, STEPS, reference_bytes
from bench.synthetic import SIZES
from bench.tables import print_table
from cache.format.codecs import stored_arrays

NUM_SAMPLES = {"pretrain": 1_246_000, "finetune": 2_428_000}
# The assumptions, besides the lengths in bench/profiles.py. Peaks are as published for dense bfloat16.
PEAK_FLOPS = {"A100 80 GB": 312e12, "H100 SXM": 989e12}
DOLLARS_AN_HOUR = {"A100 80 GB": 2.0, "H100 SXM": 3.0}
UTILISATIONS = (0.5, 0.3)  # of the peak, teacher and student alike; none measured on a GPU
STAGE_1_OVERHEAD = 1.05  # times its operations' time
DOLLARS_A_TERABYTE = 23.0 * 3  # three months
# What the authors of MobileVLM V2 report of their own training without a teacher: 8 A100 for so many hours.
PUBLISHED_GPU_HOURS = (8 * (3 + 9), 8 * (5 + 12))
FORMATS = {"all, EFLOP": ".2f", "kB, pretrain": ",.1f", "kB, finetune": ",.1f", "all, TB": ".3f",
           "TFLOP a sample, pretrain": ".2f", "TFLOP a sample, finetune": ".2f", "stub / stage 1": ".3f",
           "stage 2 / teacher in the step": ".3f", "the same, no checkpoints": ".3f"}  # fmt: skip
Steps = Mapping[str, float]  # a figure of a sample by training step
app = typer.Typer(add_completion=False)


def sample(step: str) -> Lengths:
    """A sample of mean length."""
    of = STEPS[step]
    return Lengths(of.positions_before + VISION_TOKENS + of.text_rows, of.text_rows, of.answers)


def operations() -> dict[str, dict[str, float]]:
    """Operations a sample of everything that may be run, by training step."""
    samples = {step: sample(step) for step in STEPS}
    ways = {
        "stage 1, all targets": stage_1,
        "stub: attention, vision": stub,
        "stub, tower shared": partial(stub, with_tower=False),
        "stage 2": stage_2,
        "stage 2, no checkpoints": partial(stage_2, checkpointing=False),
        "teacher in the step": online,
    }
    return {name: {step: count("full", of) for step, of in samples.items()} for name, count in ways.items()}


def total(of_a_sample: Steps) -> float:
    """The same of all samples of both steps."""
    return sum(of_a_sample[step] * NUM_SAMPLES[step] for step in STEPS)


def hours(flops: float, gpu: str, utilisation: float) -> float:
    """Hours on one GPU."""
    return flops / PEAK_FLOPS[gpu] / utilisation / 3600


def stored_bytes(step: str, profile: str) -> float:
    """Codes of a sample before compression, exact for a sample of mean length."""
    of, size = STEPS[step], STEPS[step].size(SIZES["full"], profile)
    rows = {"R": of.text_rows, "I": 1, "P": of.answers, "S": sample(step).positions}
    return sum(
        rows[spec.axes[0]] * prod(array.row_shape) * np.dtype(array.dtype).itemsize
        for spec in size.specs()
        for array in stored_arrays(spec.with_tokens(size.grid**2))
    )


def compressed_bytes(row: Mapping[str, Any]) -> float:
    """Of a sample of mean length, from a row of bench/profiles.py, whose samples chance made longer or shorter."""
    of, arrays = STEPS[row["step"]], row["array_bytes"]
    longer = {"attention": of.text_rows / row["text_rows"], "logits": of.answers / row["answers"]}
    scaled = sum(size * longer.get(name.split("/")[0], 1.0) for name, size in arrays.items())
    return row["bytes a sample"] - sum(arrays.values()) + scaled


def operations_table(counted: Mapping[str, Steps]) -> Iterator[dict[str, Any]]:
    """Operations, and hours and dollars of one GPU at both utilisations."""
    for name, of in counted.items():
        row = {"": name} | {f"TFLOP a sample, {step}": of[step] / 1e12 for step in STEPS}
        row["all, EFLOP"] = total(of) / 1e18
        for gpu, price in DOLLARS_AN_HOUR.items():
            few, many = (hours(total(of), gpu, utilisation) for utilisation in UTILISATIONS)
            row[f"{gpu}, hours"] = f"{few:,.1f}..{many:,.1f}"
            row[f"{gpu}, dollars"] = f"{few * price:,.0f}..{many * price:,.0f}"
        yield row


def runs_table(counted: Mapping[str, Steps], compressed: Mapping[str, Steps]) -> Iterator[dict[str, Any]]:
    """Dollars of N students on an A100, halfway between the utilisations."""
    a_flop = DOLLARS_AN_HOUR["A100 80 GB"] * hours(1, "A100 80 GB", sum(UTILISATIONS) / 2)
    cost = {name: total(of) * a_flop for name, of in counted.items()}
    teacher, student, stub_too = (
        cost[name] for name in ("stage 1, all targets", "stage 2", "stub: attention, vision")
    )
    once = {
        name: teacher * STAGE_1_OVERHEAD + total(of) / 1e12 * DOLLARS_A_TERABYTE
        for name, of in compressed.items()
    }
    ways = {  # dollars once, and of each student
        "teacher in every step": (0.0, teacher + student),
        "cache once: default": (once["default"], student),
        "cache once: small": (once["small"], student),
        "cache once: logits only, others recomputed": (once["logits only"], student + stub_too),
        "the same, tower shared with the student": (
            once["logits only"],
            student + cost["stub, tower shared"],
        ),
    }
    for name, (first, each) in ways.items():
        row = {"dollars of N students on A100 80 GB at 40%": name}
        row |= {f"N = {number}": f"{first + number * each:,.0f}" for number in (1, 2, 5, 10)}
        saved_by_each = teacher + student - each
        yield row | {"no dearer from N =": ceil(first / saved_by_each) if first else "-"}


def ratios_table() -> Iterator[dict[str, Any]]:
    """Ratios of operations, to compare measured ones with."""
    for size, positions in product(("small", "full"), (300, 1100)):
        text_rows = positions - STEPS["finetune"].positions_before - VISION_TOKENS
        of = Lengths(positions, text_rows, text_rows // 2)
        row = {"size": size, "positions": positions, "stub / stage 1": stub(size, of) / stage_1(size, of)}
        for name, on in (("stage 2 / teacher in the step", True), ("the same, no checkpoints", False)):
            row[name] = stage_2(size, of, checkpointing=on) / online(size, of, checkpointing=on)
        yield row


@app.command(help=__doc__.splitlines()[0])
def main() -> None:
    if not FIGURES.exists():
        raise SystemExit(f"{FIGURES}: no such file; run python -m bench.profiles, which writes it")
    full, compressed = SIZES["full"], defaultdict(dict)
    reference = {s: reference_bytes(full, of.text_rows, of.positions_before) for s, of in STEPS.items()}
    before = {f"{p}, before compression": {s: stored_bytes(s, p) for s in STEPS} for p in PROFILES}
    for row in json.loads(FIGURES.read_text()):
        compressed[row["profile"]][row["step"]] = compressed_bytes(row)
    counted = operations()
    print_table(operations_table(counted), FORMATS)
    student, number = total(counted["stage 2"]), sum(NUM_SAMPLES.values())
    at_the_peak = hours(student, "A100 80 GB", 1)
    for spent in PUBLISHED_GPU_HOURS:
        print(f"utilisation by the authors' {spent} A100 hours: {at_the_peak / spent:.0%}")
    print_table(
        (
            {"": name, **{f"kB, {step}": of[step] / 1e3 for step in STEPS}, "all, TB": total(of) / 1e12}
            for name, of in ({"the reference computes": reference} | before | compressed).items()
        ),
        FORMATS,
    )
    for gpu in PEAK_FLOPS:
        rate = number / 3600 / hours(student, gpu, UTILISATIONS[0])
        megabytes = rate * total(compressed["default"]) / number / 1e6
        print(f"a student on one {gpu} at 50% reads {rate:.0f} samples a second, {megabytes:.0f} MB")
    print_table(runs_table(counted, compressed))
    print_table(ratios_table(), FORMATS)


if __name__ == "__main__":
    app()
