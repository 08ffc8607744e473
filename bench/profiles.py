"""Bytes a sample at each profile of the targets, at full shapes, beside what the reference computes of it.

python -m bench.profiles

**The values are made up** (bench/synthetic.py); the shapes are those of MobileVLM V2's 7B teacher, and texts are as
long as in each step of its training on average. The bytes are the whole store's on the disk, compressed, index and
metadata included. Errors are of values: root mean square error over root mean square.

The reference computes, in float16: attention of layer 0, every head, text rows x vision tokens; projected vision
features; logits of every position over the whole vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from bench.synthetic import SIZES, Arrays, Size, add_sample, manifest, rows_of, samples
from bench.tables import print_table
from cache import ArraySpec, StoreWriter, part_sizes
from cache.format.codecs import decode_rows, encode_rows

FIGURES = Path("runs/bench/profiles.json")  # bench/extrapolate.py reads them
# Written in docs/codecs.md, too, which says what each loses; a test compares them.
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "default": {"attention": {}, "vision": {}, "logits": {}},
    "small": {"attention": {"codec": "fixed_point"}, "vision": {"step": 2.0**-4}, "logits": {"top_k": 16}},
    "logits only": {"attention": {"source": "recompute"}, "vision": {"source": "recompute"}, "logits": {}},
    "every head": {"attention": {"heads": "each"}, "vision": {}, "logits": {}},
}
COLUMNS = {"step": "", "profile": "", "bytes a sample": ",.0f", "reference": ",.0f", "times smaller": ".1f",
           "vision error": ".1e", "attention error": ".1e"}  # fmt: skip
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Step:
    """A step of training: how long its samples are. ASSUMED means, from what is known of the data."""

    text_rows: int  # text positions after the first vision token
    answers: int  # of these
    positions_before: int  # of the prompt, before the image

    def size(self, full: Size, profile: str) -> Size:
        """The shapes of this step's synthetic samples, with what the profile keeps."""
        kept = {name: s for name, s in PROFILES[profile].items() if s.get("source") != "recompute"}
        # A lognormal's mean is e^(sigma^2 / 2) of its median, which is what `mean_rows` sets; sigma is 0.5 there.
        median_rows = round(self.text_rows / np.exp(0.125))
        return replace(full, mean_rows=median_rows, answer_share=self.answers / self.text_rows, targets=kept)


STEPS = {
    "pretrain": Step(text_rows=190, answers=190, positions_before=1),
    "finetune": Step(text_rows=110, answers=60, positions_before=35),
}


def reference_bytes(size: Size, rows: float, positions_before: int) -> float:
    """Bytes of the float16 values that the reference computes of a sample with so many rows of text."""
    tokens = size.grid**2
    attention, vision = size.num_heads * rows * tokens, tokens * size.hidden_size
    return 2 * (attention + vision + (positions_before + tokens + rows) * size.vocab_size)


def measure(step: str, profile: str, full: Size, number: int) -> dict[str, Any]:
    """Write a store of so many samples; its bytes and errors."""
    size = STEPS[step].size(full, profile)
    lossy = [spec for spec in size.specs() if spec.codec != "integer"]
    squares = {spec.name: np.zeros(2) for spec in lossy}
    rows = answers = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with StoreWriter.open(store, manifest(size, ["part"])).part("part", source={}) as part:
            for index, arrays in enumerate(samples(size, number)):
                for spec in lossy:
                    squares[spec.name] += _squares(spec, arrays)
                rows += len(arrays["input_ids"])
                answers += int((arrays["labels"] != -100).sum())
                add_sample(part, index, arrays)
            part.commit()
        [sizes] = part_sizes(store)
        whole = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    reference = reference_bytes(size, rows / number, STEPS[step].positions_before)
    errors = {name: (of_error / of_values) ** 0.5 for name, (of_error, of_values) in squares.items()}
    return {
        "step": step,
        "profile": profile,
        "bytes a sample": whole / number,
        "reference": reference,
        "times smaller": reference * number / whole,
        "vision error": errors.get("vision", np.nan),
        "attention error": errors.get("attention/layer_0", np.nan),
        "text_rows": rows / number,
        "answers": answers / number,
        "array_bytes": {name: taken / number for name, taken in sizes.array_bytes.items()},
    }


def _squares(spec: ArraySpec, arrays: Arrays) -> np.ndarray:
    """Sums of squares of what coding changes, and of the values themselves."""
    spec, rows = rows_of(spec, arrays)
    coded = decode_rows(spec, encode_rows(spec, rows))
    return np.array([np.square(values, dtype=np.float64).sum() for values in (coded - rows, rows)])


@app.command(help=__doc__.splitlines()[0])
def main(samples: int = 200) -> None:
    rows = [measure(step, profile, SIZES["full"], samples) for step in STEPS for profile in PROFILES]
    print_table(({name: row[name] for name in COLUMNS} for row in rows), COLUMNS, num_text_columns=2)
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app()
