"""The join: a sample's image and text from its shard, its targets from the store, matched by key and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import Dataset

from cache import Mirror, SampleEntry, Store
from pipeline.config import CacheConfig
from pipeline.conversation import TokenizedSample
from pipeline.errors import BadSample, ConfigError, JoinError
from pipeline.inputs import Preparation, pad_tokens
from pipeline.memory import BoundedCache, TensorCache
from pipeline.shards import expand_shards, parse_record, part_name, read_span
from pipeline.targets import TARGETS, TeacherFacts

PIXEL_CACHE_BYTES = 256 * 2**20
STORED_CACHE_BYTES = 256 * 2**20
CHANGED = "the shard changed after it was cached: restore it, or cache it again into a new store"


@dataclass(frozen=True)
class JoinedSample:
    """A training sample: tokens, pixels of its images (in order, by digest) and the stored target arrays."""

    key: str
    tokens: TokenizedSample
    pixels: dict[str, torch.Tensor]
    image_digests: tuple[str, ...]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class StoredSample:
    """What the store holds of a sample, decoded."""

    tokens: TokenizedSample
    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return 80 * len(self.tokens.input_ids) + sum(array.nbytes for array in self.arrays.values())


class JoinedDataset(Dataset[JoinedSample]):
    """Map-style: every sample that the store cached from the given shards, in the store's order (see `is_chosen`).

    The first time a sample is read, its text is tokenised and compared with the ids and labels that the teacher
    saw, and its image bytes with their digest; later epochs trust that. Raises `JoinError` on any difference.
    """

    def __init__(
        self,
        store: Store,
        shards: str | Sequence[str],
        preparation: Preparation,
        *,
        targets: Mapping[str, Any],
        fraction: float = 1.0,
    ):
        self.store = store
        self.preparation = preparation
        self.targets = targets
        self.shards = {part_name(shard): shard for shard in expand_shards(shards)}
        if missing := sorted(self.shards.keys() - set(store.parts)):
            raise ConfigError(
                f"{store.path} has no finished part for {len(missing)} of {len(self.shards)} shards, "
                f"first {missing[0]!r}; run `alignkd teacher-cache` with this config"
            )
        self.rows = [
            (part, entry)
            for part in sorted(self.shards)
            for entry in store.entries(part)
            if is_chosen(entry, fraction)
        ]
        if not self.rows:
            raise ConfigError(
                f"{store.path} holds no sample of data.shards"
                + (
                    "; see its rejects with `alignkd info`"
                    if fraction == 1
                    else f" within data.fraction {fraction:g}: raise it"
                )
            )
        facts = teacher_facts(store)
        self.names = [spec.name for name, t in targets.items() for spec in TARGETS[name].arrays(t, facts)]
        self.verified: set[str] = set()
        self.pixels = TensorCache(PIXEL_CACHE_BYTES)
        self.stored: BoundedCache[StoredSample] = BoundedCache(STORED_CACHE_BYTES)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> JoinedSample:
        part, entry = self.rows[index]
        stored = self.stored.get(entry.key) or self.stored.put(entry.key, self._read(part, entry))
        pixels = {digest: self._pixels(part, entry, n) for n, digest in enumerate(entry.images)}
        return JoinedSample(entry.key, stored.tokens, pixels, entry.images, stored.arrays)

    def _read(self, part: str, entry: SampleEntry) -> StoredSample:
        arrays = self.store.read(entry.key, ["input_ids", "labels", *self.names])
        tokens = TokenizedSample(
            tuple(arrays.pop("input_ids").tolist()), tuple(arrays.pop("labels").tolist())
        )
        if entry.key not in self.verified:
            self._compare_tokens(part, entry, tokens)
            self.verified.add(entry.key)
        arrays["num_images"] = np.array(len(entry.images))
        return StoredSample(tokens, arrays)

    def _compare_tokens(self, part: str, entry: SampleEntry, stored: TokenizedSample) -> None:
        mine = self._tokens_of_shard(part, entry)
        for what, theirs, ours in (
            ("token ids", stored.input_ids, mine.input_ids),
            ("labels", stored.labels, mine.labels),
        ):
            if theirs != ours:
                raise JoinError(
                    f"sample {entry.key!r} of {self.shards[part]}: its {what} are not those that the teacher saw "
                    f"({_first_difference(theirs, ours)}); {CHANGED}"
                )

    def _tokens_of_shard(self, part: str, entry: SampleEntry) -> TokenizedSample:
        try:
            record = parse_record(read_span(self.shards[part], entry.json_span))
            return self.preparation.tokenize(record.get("conversations"))  # pyright: ignore[reportArgumentType]
        except BadSample as error:
            raise JoinError(
                f"sample {entry.key!r} of {self.shards[part]}: {entry.json_span.file!r} holds no usable text "
                f"({error.reason}), the teacher saw some; {CHANGED}"
            ) from error

    def _pixels(self, part: str, entry: SampleEntry, number: int) -> torch.Tensor:
        digest = entry.images[number]
        if (known := self.pixels.get(digest)) is not None:
            return known
        data = read_span(self.shards[part], entry.image_spans[number])
        if (found := blake3(data).hexdigest()) != digest:
            raise JoinError(
                f"sample {entry.key!r} of {self.shards[part]}: image {entry.image_spans[number].file!r} has digest "
                f"{found[:16]}, the teacher saw {digest[:16]}; {CHANGED}"
            )
        return self.pixels.put(digest, self.preparation.preprocess(data))


def open_store(cache: CacheConfig) -> Store:
    """The store, read-only; one behind a URL through the mirror, if there is one."""
    kept = Mirror(Path(cache.mirror).expanduser(), cache.mirror_bytes) if cache.mirror else None
    return Store(cache.path, mirror=kept)


def teacher_facts(store: Store) -> TeacherFacts:
    """The facts of the teacher whose knowledge the store holds."""
    known = {field.name for field in fields(TeacherFacts)}
    return TeacherFacts(**{name: value for name, value in store.manifest.teacher.items() if name in known})


def is_chosen(entry: SampleEntry, fraction: float) -> bool:
    """Whether `data.fraction` takes a sample: by its first image's digest, or its key's if it has no image.

    All samples of an image go together, and a smaller fraction is part of a larger one.
    """
    digest = entry.images[0] if entry.images else blake3(entry.key.encode()).hexdigest()
    return int(digest[:8], 16) < fraction * 2**32


def _first_difference(theirs: Sequence[int], ours: Sequence[int]) -> str:
    for position, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a != b:
            return f"at position {position}: store {a}, mine {b}"
    return f"store has {len(theirs)}, mine {len(ours)}"


@dataclass(frozen=True)
class JoinCollator:
    """Joined samples -> the batch that `Distiller.forward` takes."""

    targets: Mapping[str, Any]

    def __call__(self, samples: Sequence[JoinedSample]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` 'B S'; `pixel_values` 'I C Y X' or None; `image_digests`;
        `targets` fields of `TeacherTargets`; `received` target -> rows that each sample brought, int64 'B'.
        """
        pixels = [sample.pixels[digest] for sample in samples for digest in sample.image_digests]
        batch: dict[str, Any] = pad_tokens([sample.tokens for sample in samples])
        batch["pixel_values"] = torch.stack(pixels) if pixels else None
        batch["image_digests"] = [digest for sample in samples for digest in sample.image_digests]
        batch["targets"], batch["received"] = {}, {}
        for name, settings in self.targets.items():
            arrays = [sample.arrays for sample in samples]
            batch["targets"] |= TARGETS[name].collate(settings, arrays)
            first = TARGETS[name].first_array(settings)
            batch["received"][name] = torch.tensor([len(sample[first]) for sample in arrays])
        return batch
