"""MobileVLM V2's 3.7 million samples, on paper: operations, bytes, hours and money of every way to distil.

python -m bench.profiles                     measures the bytes of a sample first
python -m bench.extrapolate

Arithmetic alone: nothing here is timed. Operations are counted from the shapes (bench/flops.py). Hours are operations
over a published peak times an assumed utilisation, dollars are hours times an assumed price. Every image is taken as
distinct, every step as one epoch, gradient checkpointing as on unless it says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
import typer

from bench.flops import VISION_TOKENS, Sample, online, stage_1, stage_2, stub
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
Steps = Mapping[str, float]  # a figure of a sample by training step
app = typer.Typer(add_completion=False)


def sample(step: str) -> Sample:
    """A sample of mean length."""
    of = STEPS[step]
    return Sample(of.positions_before + VISION_TOKENS + of.text_rows, of.text_rows, of.answers)


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
    of = STEPS[step]
    rows = {"R": of.text_rows, "I": 1, "P": of.answers, "S": of.positions_before + of.text_rows + 1}
    return sum(
        rows[spec.axes[0]] * prod(array.row_shape) * np.dtype(array.dtype).itemsize
        for spec in of.size(SIZES["full"], profile).specs()
        for array in stored_arrays(spec)
    )


def compressed_bytes(row: Mapping[str, Any]) -> float:
    """Of a sample of mean length, from a row of bench/profiles.py, whose samples chance made longer or shorter."""
    of, arrays = STEPS[row["step"]], row["array_bytes"]
    longer = {"attention": of.text_rows / row["text_rows"], "logits": of.answers / row["answers"]}
    scaled = sum(size * longer.get(name.split("/")[0], 1.0) for name, size in arrays.items())
    return row["bytes"] - sum(arrays.values()) + scaled


def break_even(*, saved: float, once: float) -> int:
    """Runs from which paying `once` is no dearer, where every run saves so much; both in one unit."""
    return max(1, ceil(once / saved))


def operations_table(counted: Mapping[str, Steps]) -> list[dict[str, str]]:
    """Operations, and hours and dollars of one GPU at both utilisations."""
    rows = []
    for name, of in counted.items():
        row = {"": name} | {f"TFLOP a sample, {step}": f"{of[step] / 1e12:.2f}" for step in STEPS}
        row["all, EFLOP"] = f"{total(of) / 1e18:.2f}"
        for gpu, price in DOLLARS_AN_HOUR.items():
            few, many = (hours(total(of), gpu, utilisation) for utilisation in UTILISATIONS)
            row |= {f"{gpu}, hours": f"{few:,.1f}..{many:,.1f}"}
            row |= {f"{gpu}, dollars": f"{few * price:,.0f}..{many * price:,.0f}"}
        rows.append(row)
    return rows


def bytes_table(sizes: Mapping[str, Steps]) -> list[dict[str, str]]:
    return [
        {"": name}
        | {f"kB a sample, {step}": f"{of[step] / 1e3:,.1f}" for step in STEPS}
        | {"all, TB": f"{total(of) / 1e12:.3f}"}
        for name, of in sizes.items()
    ]


def runs_table(counted: Mapping[str, Steps], compressed: Mapping[str, Steps]) -> list[dict[str, str]]:
    """Dollars of N students on an A100, halfway between the utilisations."""
    a_flop = DOLLARS_AN_HOUR["A100 80 GB"] * hours(1, "A100 80 GB", sum(UTILISATIONS) / 2)
    cost = {name: total(of) * a_flop for name, of in counted.items()}
    teacher, student = cost["stage 1, all targets"], cost["stage 2"]
    once = {
        profile: teacher * STAGE_1_OVERHEAD + total(of) / 1e12 * DOLLARS_A_TERABYTE
        for profile, of in compressed.items()
    }
    logits = once["logits only"]
    ways = {  # dollars once, and of each student
        "teacher in every step": (0.0, teacher + student),
        "cache once: default": (once["default"], student),
        "cache once: small": (once["small"], student),
        "cache once: logits only, others recomputed": (logits, student + cost["stub: attention, vision"]),
        "the same, tower shared with the student": (logits, student + cost["stub, tower shared"]),
    }
    return [
        {"dollars of N students on A100 80 GB at 40%": name}
        | {f"N = {number}": f"{first + number * each:,.0f}" for number in (1, 2, 5, 10)}
        | {
            "no dearer from N =": str(break_even(saved=teacher + student - each, once=first))
            if first
            else "-"
        }
        for name, (first, each) in ways.items()
    ]


def ratios_table() -> list[dict[str, str]]:
    """Ratios of operations, to compare measured ones with."""
    rows = []
    for size, positions in product(("small", "full"), (300, 1100)):
        text_rows = positions - STEPS["finetune"].positions_before - VISION_TOKENS
        of = Sample(positions, text_rows, text_rows // 2)
        ratios = {
            "stub / stage 1": stub(size, of) / stage_1(size, of),
            "stage 2 / teacher in the step": stage_2(size, of) / online(size, of),
            "the same, no checkpoints": stage_2(size, of, checkpointing=False)
            / online(size, of, checkpointing=False),
        }
        rows.append({"size": size, "positions": positions, **{n: f"{r:.3f}" for n, r in ratios.items()}})
    return rows


@app.command(help=__doc__.splitlines()[0])
def main() -> None:
    if not FIGURES.exists():
        raise SystemExit(f"{FIGURES}: no such file; run python -m bench.profiles, which writes it")
    compressed: dict[str, dict[str, float]] = {}
    for row in json.loads(FIGURES.read_text()):
        compressed.setdefault(row["profile"], {})[row["step"]] = compressed_bytes(row)
    counted = operations()
    print_table(operations_table(counted))
    lowest, highest = (
        hours(total(counted["stage 2"]), "A100 80 GB", 1) / of for of in reversed(PUBLISHED_GPU_HOURS)
    )
    print(f"\nutilisation by the authors' {PUBLISHED_GPU_HOURS} A100 hours: {lowest:.0%} to {highest:.0%}\n")
    reference = {
        s: reference_bytes(SIZES["full"], of.text_rows, of.positions_before) for s, of in STEPS.items()
    }
    before = {profile: {step: stored_bytes(step, profile) for step in STEPS} for profile in PROFILES}
    print_table(bytes_table({"the reference computes": reference, **before}))
    print("\ncompressed")
    print_table(bytes_table(compressed))
    print()
    for gpu in PEAK_FLOPS:
        rate = sum(NUM_SAMPLES.values()) / 3600 / hours(total(counted["stage 2"]), gpu, UTILISATIONS[0])
        megabytes = rate * total(compressed["default"]) / sum(NUM_SAMPLES.values()) / 1e6
        print(f"a student on one {gpu} at 50% reads {rate:.0f} samples a second, {megabytes:.0f} MB")
    print()
    print_table(runs_table(counted, compressed))
    print()
    print_table(ratios_table())


if __name__ == "__main__":
    app()
