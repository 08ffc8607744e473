"""Synthetic samples in the shapes of a store of MobileVLM V2's teacher: made-up values of a likely spread.

Vision: 64 smooth maps mixed into every channel, and a little noise; the median channel's deviation is 0.44, and 24
channels are 8 to 40 times as strong. Attention: the mean over heads of softmax rows whose logits spread by 0.2 to
3.5. Logits: log probabilities that fall, and what is left of the mass. Rows of text are lognormal about 110, answers
55 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from blake3 import blake3

from cache import FORMAT_VERSION, ArraySpec, Fingerprint, Manifest, PartWriter, SampleEntry, Span
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS
from pipeline.teacher_cache.teacher import TOKEN_ARRAYS

Arrays = dict[str, Any]
NUM_MAPS = 64
OF_STUDENTS = ("attention", "vision", "logits")  # the targets that are made up here


@dataclass(frozen=True)
class Size:
    """Shapes of a teacher, and of its samples: one image, rows of text about a mean.

    `targets` are what is kept, each with the settings that are not its defaults. With `ragged` arrays each image has
    the vision tokens of a square grid, whose edge lies between `least_grid` (if there is one) and `grid`.
    """

    hidden_size: int
    grid: int  # vision tokens of an image, along an edge; the longest where images differ
    num_heads: int
    vocab_size: int
    mean_rows: int
    part_samples: int
    answer_share: float = 0.55  # of the rows of text
    targets: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {name: {} for name in OF_STUDENTS}
    )
    ragged: bool = False
    least_grid: int | None = None

    def facts(self) -> TeacherFacts:
        """What the store says of its teacher."""
        return TeacherFacts(
            "", 32, self.num_heads, self.hidden_size, self.vocab_size, num_vision_tokens=self.grid**2
        )

    def specs(self) -> tuple[ArraySpec, ...]:
        """The arrays of the store."""
        of_targets = [TARGETS[name](**given).arrays(self.facts()) for name, given in self.targets.items()]
        specs = (*TOKEN_ARRAYS, *(spec for specs in of_targets for spec in specs))
        return tuple(map(_ragged, specs)) if self.ragged else specs


def _ragged(spec: ArraySpec) -> ArraySpec:
    """The spec with rows as long as the image has vision tokens, if its last axis counts these."""
    last = (None,) if spec.axes.endswith("N") else spec.row_shape[-1:]
    return replace(spec, row_shape=(*spec.row_shape[:-1], *last))


SIZES = {
    "full": Size(4096, 12, 32, 32000, mean_rows=110, part_samples=200, ragged=True),
    "mixed": Size(4096, 32, 32, 32000, mean_rows=110, part_samples=50, ragged=True, least_grid=8),
    "fixed": Size(4096, 12, 32, 32000, mean_rows=110, part_samples=200),
    "small": Size(64, 4, 4, 500, mean_rows=20, part_samples=16),
    "small, mixed": Size(64, 6, 4, 500, mean_rows=20, part_samples=16, ragged=True, least_grid=2),
}


def samples(size: Size, number: int) -> Iterator[Arrays]:
    """Sample after sample: its arrays as a teacher would give them, `vision` of its one image.

    A ragged array of the sample is a list with the block of its one image.
    """
    is_ragged = {spec.name: spec.is_ragged for spec in size.specs()}
    chance = np.random.default_rng(0)
    mixing = chance.normal(size=(size.hidden_size, NUM_MAPS)).astype(np.float32) / NUM_MAPS**0.5
    gains = np.full(size.hidden_size, 0.44, dtype=np.float32)
    loud = chance.choice(size.hidden_size, 24, replace=False)
    gains[loud] *= chance.uniform(8, 40, size=24).astype(np.float32)
    for _ in range(number):
        rows = int(np.clip(chance.lognormal(np.log(size.mean_rows), 0.5), 4, 6 * size.mean_rows))
        answers = max(1, int(rows * size.answer_share))
        edge = int(chance.integers(size.least_grid, size.grid + 1)) if size.least_grid else size.grid
        arrays = {
            "input_ids": _token_ids(chance, rows, size),
            "labels": np.where(np.arange(rows) < rows - answers, -100, _token_ids(chance, rows, size)),
        }
        if "attention" in size.targets:
            attention = _attention(chance, rows, edge, size)
            arrays["attention/layer_0"] = [attention] if is_ragged["attention/layer_0"] else attention
        if "vision" in size.targets:
            arrays["vision"] = _vision(chance, mixing, edge)[None] * gains[:, None]
        yield arrays | (_logits(chance, answers, size) if "logits" in size.targets else {})


def _token_ids(chance: np.random.Generator, rows: int, size: Size) -> np.ndarray:
    return np.minimum(chance.zipf(1.2, size=rows), size.vocab_size - 1)


def rows_of(spec: ArraySpec, arrays: Arrays) -> tuple[ArraySpec, np.ndarray]:
    """All rows of a sample's array, and the spec of rows of this one size."""
    values = arrays[spec.name]
    rows = values[0] if isinstance(values, list) else values
    return (spec.with_tokens(rows.shape[-1]) if spec.is_ragged else spec), rows


def _attention(chance: np.random.Generator, rows: int, edge: int, size: Size) -> np.ndarray:
    """float32 'R H N', a softmax whose mass on vision tokens is 0.03 to 0.96; 'R 1 N' for the mean of heads."""
    spread = np.geomspace(0.2, 3.5, size.num_heads, dtype=np.float32)[:, None, None]
    logits = chance.standard_normal((size.num_heads, rows, edge**2), dtype=np.float32) * spread
    exponents = np.exp(logits)
    mass = chance.uniform(0.03, 0.96, size=(size.num_heads, rows, 1)).astype(np.float32)
    of_heads = (exponents / exponents.sum(axis=-1, keepdims=True) * mass).transpose(1, 0, 2)
    return of_heads if size.targets["attention"].get("heads") == "each" else of_heads.mean(axis=1)[:, None]


def _vision(chance: np.random.Generator, mixing: np.ndarray, edge: int) -> np.ndarray:
    """float32 'D N' of about unit deviation: maps with a 1/f spectrum, mixed, and a little noise."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(edge), np.fft.fftfreq(edge)))
    falling = 1 / np.maximum(frequency, 1 / edge)
    spectrum = np.fft.fft2(chance.normal(size=(NUM_MAPS, edge, edge))) * falling
    maps = np.fft.ifft2(spectrum).real.reshape(NUM_MAPS, -1)
    maps = (maps / maps.std(axis=1, keepdims=True)).astype(np.float32)
    return mixing @ maps + 0.05 * chance.standard_normal((len(mixing), edge**2), dtype=np.float32)


def _logits(chance: np.random.Generator, answers: int, size: Size) -> Arrays:
    top_k = next(spec for spec in size.specs() if spec.name == "logits/ids").row_shape[0]
    ids = chance.integers(size.vocab_size, size=(answers, top_k))
    scores = -np.log(np.arange(1, top_k + 1)) * chance.uniform(0.8, 4, size=(answers, 1))
    scores += np.sort(chance.gumbel(size=(answers, top_k)), axis=1)[:, ::-1]
    tail = chance.uniform(0.005, 0.2, size=(answers, 1))
    log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)) + np.log1p(-tail)
    return {"logits/ids": ids, "logits/log_probs": log_probs.astype(np.float32),
            "logits/tail": np.log(tail[:, 0]).astype(np.float32)}  # fmt: skip


def manifest(size: Size, parts: Sequence[str]) -> Manifest:
    """The manifest of a store of synthetic samples."""
    fingerprint, teacher = Fingerprint("", "", "", "", ""), asdict(size.facts())
    return Manifest(
        FORMAT_VERSION, fingerprint, size.specs(), teacher, {}, {"values": "synthetic"}, tuple(parts)
    )


def add_sample(part: PartWriter, index: int, arrays: Arrays) -> None:
    """Add a synthetic sample, with an image of its own, to a part."""
    key, place = f"{index:09d}", 512 + 90_112 * index
    digest = blake3(key.encode()).hexdigest()
    image, text = Span(f"{key}.jpg", place, 80_000), Span(f"{key}.json", place + 81_920, 900)
    tokens = arrays["vision"].shape[-1] if "vision" in arrays else 0
    of_image = {name: arrays[name] for name in arrays if name == "vision"}
    part.add_image(digest, of_image, tokens=tokens, grid=(math.isqrt(tokens), math.isqrt(tokens)))
    of_sample = {name: arrays[name] for name in arrays if name != "vision"}
    part.add(SampleEntry(key, (digest,), (image,), text), of_sample)
