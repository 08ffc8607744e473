"""Bytes a sample at each profile of the targets, at full shapes, against what the reference computes of it.

python bench/profiles.py
python bench/profiles.py --quick

**The values are made up** (bench/reading_samples.py); the shapes are those of MobileVLM V2's 7B teacher, and texts as
long as in each step of its training on average. The bytes are the whole store's on the disk, compressed, index and
metadata included. Errors are of values: root mean square error over root mean square.

The reference computes, in float16: attention of layer 0, every head, text rows x vision tokens; projected vision
features; logits of every position over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from reading_samples import SIZES, Size, entry_of, manifest, samples

from cache import CODECS, ArraySpec, StoreWriter, part_sizes
from cache.format.codecs import decode_rows, encode_rows

Targets = Mapping[str, Mapping[str, Any]]
FLOAT16_BYTES = 2
# A lognormal's mean is e^(sigma^2 / 2) of its median, which is what `Size.mean_rows` sets; sigma is 0.5 there.
MEAN_OVER_MEDIAN = np.exp(0.125)

# As in docs/codecs.md, which says what each loses; a test holds them together.
PROFILES: dict[str, Targets] = {
    "default": {"attention": {}, "vision": {}, "logits": {}},
    "small": {"attention": {"codec": "fixed_point"}, "vision": {"step": 2.0**-4}, "logits": {"top_k": 16}},
    "logits only": {"attention": {"source": "recompute"}, "vision": {"source": "recompute"}, "logits": {}},
    "every head": {"attention": {"heads": "each"}, "vision": {}, "logits": {}},
}
BARS = {"default": 20, "small": 40, "logits only": 1000}  # 1 / so much of what the reference computes


@dataclass(frozen=True)
class Step:
    """A step of training: how long its samples are. ASSUMED means, from what is known of the data."""

    text_rows: int  # text positions after the first vision token
    answers: int  # of these
    positions_before: int  # of the prompt, before the image

    def size(self, full: Size, targets: Targets) -> Size:
        """Shapes of a synthetic sample of this step, with these targets kept."""
        return replace(
            full,
            mean_rows=round(self.text_rows / MEAN_OVER_MEDIAN),
            answer_share=self.answers / self.text_rows,
            targets={name: s for name, s in targets.items() if s.get("source") != "recompute"},
        )


STEPS = {
    "pretrain": Step(text_rows=190, answers=190, positions_before=1),
    "finetune": Step(text_rows=110, answers=60, positions_before=35),
}


def reference_bytes(size: Size, rows: float, positions_before: int) -> dict[str, float]:
    """float16 values that the reference computes of a sample with so many rows of text."""
    tokens = size.grid**2
    positions = positions_before + tokens + rows
    return {
        "attention": FLOAT16_BYTES * size.num_heads * rows * tokens,
        "vision": FLOAT16_BYTES * tokens * size.hidden_size,
        "logits": FLOAT16_BYTES * positions * size.vocab_size,
    }


def measure(step: str, profile: str, full: Size, number: int) -> dict[str, Any]:
    """Write a store of so many samples, and say what it takes."""
    size = STEPS[step].size(full, PROFILES[profile])
    errors = {spec.name: _Error(spec) for spec in size.specs() if spec.codec != "integer"}
    rows = answers = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with StoreWriter.open(store, manifest(size.specs(), ["part"])).part("part", source={}) as part:
            for number_of, arrays in enumerate(samples(size, number)):
                for name, error in errors.items():
                    error.add(arrays[name])
                rows += len(arrays["input_ids"])
                answers += int((arrays["labels"] != -100).sum())
                entry = entry_of(number_of)
                of_image = {"vision": arrays.pop("vision")} if "vision" in arrays else {}
                part.add_image(entry.images[0], of_image)
                part.add(entry, arrays)
            part.commit()
        [sizes] = part_sizes(store)
        whole = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    reference = reference_bytes(size, rows / number, STEPS[step].positions_before)
    return {
        "step": step,
        "profile": profile,
        "targets": PROFILES[profile],
        "samples": number,
        "text_rows": rows / number,
        "answers": answers / number,
        "bytes_per_sample": whole / number,
        "array_bytes_per_sample": {name: size / number for name, size in sizes.array_bytes.items()},
        "other_bytes_per_sample": (whole - sum(sizes.array_bytes.values())) / number,
        "reference_bytes": reference,
        "times_smaller": sum(reference.values()) / (whole / number),
        "errors": {name: error.relative_rms for name, error in errors.items()},
        "stated_errors": {s.name: CODECS[s.codec].stated_error(s.options) for s in size.specs()},
    }


class _Error:
    """Sums of squares of an array's values and of what coding changes of them."""

    def __init__(self, spec: ArraySpec):
        self.spec, self.of_error, self.of_values = spec, 0.0, 0.0

    def add(self, rows: np.ndarray) -> None:
        coded = decode_rows(self.spec, encode_rows(self.spec, rows))
        self.of_error += float(np.square(coded - rows, dtype=np.float64).sum())
        self.of_values += float(np.square(rows, dtype=np.float64).sum())

    @property
    def relative_rms(self) -> float:
        return (self.of_error / self.of_values) ** 0.5


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each step and profile, with its bar."""
    yield "step      profile      bytes a sample  reference      of it  asked   met   vision error  attention error"
    for row in rows:
        bar, errors = BARS.get(row["profile"]), row["errors"]
        figures = [errors.get(name) for name in ("vision", "attention/layer_0")]
        vision, attention = ("-" if figure is None else f"{figure:.1e}" for figure in figures)
        asked = "-" if bar is None else f"1/{bar}"
        met = "-" if bar is None else "yes" if row["times_smaller"] >= bar else "NO"
        ratio = f"1/{row['times_smaller']:.{1 if row['times_smaller'] < 100 else 0}f}"
        yield (
            f"{row['step']:<9} {row['profile']:<12} {row['bytes_per_sample']:14,.0f} "
            f"{sum(row['reference_bytes'].values()):10,.0f}  {ratio:>7}  "
            f"{asked:<6}  {met:<4}  {vision:<12}  {attention}"
        )


def explained(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the table's columns are, and what of it is made up."""
    yield "synthetic values at full shapes: bytes are measured, and real features may compress otherwise"
    for row in rows:
        if row["profile"] == "default":
            parts = ", ".join(f"{name} {size:,.0f}" for name, size in row["reference_bytes"].items())
            yield (
                f"{row['step']}: {row['samples']} samples, on average {row['text_rows']:.0f} rows of text "
                f"and {row['answers']:.0f} answers (assumed means); the reference computes {parts} bytes"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="8 samples in small shapes")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/profiles.json"))
    options = parser.parse_args()
    full, number = (SIZES["small"], 8) if options.quick else (SIZES["full"], options.samples)
    rows = [measure(step, profile, full, number) for step in STEPS for profile in PROFILES]
    print("\n".join([*table(rows), "", *explained(rows)]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"values": "synthetic", "size": "small" if options.quick else "full", "rows": rows}
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
