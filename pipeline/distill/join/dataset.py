"""The join: a sample's image and text from its shard, and its targets from the store, matched by key and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch.utils.data import Dataset, get_worker_info

from cache import CacheError, SampleEntry, Store
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.shard_identity import check_unchanged
from pipeline.data.shard_kinds import is_remote, part_name
from pipeline.data.shard_names import expand_shards
from pipeline.data.spans import Place, SpanReader, check_ranges
from pipeline.distill.join.memory import BoundedCache
from pipeline.distill.join.missing import join_rows
from pipeline.distill.join.rank_batches import Draw
from pipeline.distill.join.rows import Row
from pipeline.distill.join.sample import JoinedSample, by_image, read_pixels
from pipeline.distill.join.stores import Stores
from pipeline.distill.join.text import compare_text, own_text
from pipeline.errors import ConfigError, JoinError, PipelineError
from pipeline.positions import Counts
from pipeline.targets.target import Arrays, Target, TeacherFacts

PIXEL_CACHE_BYTES = 256 * 2**20
STORED_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredSample:
    """A sample as the store holds it, decoded."""

    tokens: TokenizedSample
    arrays: Arrays

    @property
    def nbytes(self) -> int:
        # Two Python integers a token, with their places in tuples.
        arrays = (
            part for array in self.arrays.values() for part in (array if isinstance(array, list) else [array])
        )
        return 80 * len(self.tokens.input_ids) + sum(array.nbytes for array in arrays)


class Pixels(dict[str, torch.Tensor]):
    """The pixel inputs of one image, which know their size in bytes."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())


@dataclass(frozen=True)
class Refused:
    """The reason why a data-loading worker could not read a batch, in place of the batch."""

    reason: str

    @staticmethod
    def check(batch: Mapping[str, Any]) -> None:
        """Raise `JoinError` if a batch holds such a reason."""
        if (reason := batch.get("refused")) is not None:
            raise JoinError(reason)


class JoinedDataset(Dataset[JoinedSample]):
    """The samples that the stores hold of the given shards, in the stores' order; map-style.

    `shards` names them as `data.shards` does, or holds them by their parts' names.

    The first time a sample is read, its text is tokenised and compared with the ids and labels that the teacher saw,
    in every store, and its image bytes are compared with their digest; later epochs trust that. A student that may
    read text or images in another way (`Stores.read_alike`) gets its own ids, of which only what the targets are
    aligned with is compared. Without `reads_shards` samples have the stored ids and no pixels, and nothing is
    compared. Raises `JoinError` on any difference, `ConfigError` if there is no sample.
    """

    def __init__(
        self,
        stores: Stores | Store,
        shards: str | Sequence[str] | Mapping[str, str],
        preparation: Preparation,
        *,
        targets: Mapping[str, Target],
        fraction: float = 1.0,
        read: SpanReader | None = None,
        reads_shards: bool = True,
    ):
        self.stores = stores if isinstance(stores, Stores) else Stores.single(stores, targets)
        self.preparation = preparation
        self.targets = targets
        self.shards = (
            dict(shards)
            if isinstance(shards, Mapping)
            else {part_name(shard): shard for shard in expand_shards(shards)}
        )
        check_ranges(list(self.shards.values()))
        check_unchanged(self.stores.opened, self.shards)
        self.read, self.reads_shards = read or SpanReader(), reads_shards
        self.has_remote = any(map(is_remote, self.shards.values()))
        is_taken = None if fraction >= 1 else partial(is_chosen, fraction=fraction)
        joined = join_rows(self.stores, self.shards, is_taken)
        self.rows, self.missing = joined.rows, joined.missing
        if not len(self.rows):
            held = "holds no sample" if len(self.stores.sources) == 1 else "hold no sample in common"
            raise ConfigError(
                f"{self.stores} {held} of data.shards"
                + (
                    "; see its rejects with `alignkd info`"
                    if fraction == 1
                    else f" within data.fraction {fraction:g}: raise it"
                )
            )
        self.names = [source.arrays(targets) for source in self.stores.sources]
        self.verified = np.zeros(len(self.rows), dtype=np.bool_)
        self.pixels: BoundedCache[Pixels] = BoundedCache(PIXEL_CACHE_BYTES)
        self.stored: BoundedCache[StoredSample] = BoundedCache(STORED_CACHE_BYTES)

    def __len__(self) -> int:
        return len(self.rows)

    def lacking(self, index: int | None = None) -> frozenset[str]:
        """Return the targets of a sample, or of any sample, that no store gave and that are recomputed."""
        lacks = self.rows.lacks if index is None else self.rows.lacks[[index]]
        lost = {
            target
            for source, of_one in zip(self.stores.sources, lacks.T, strict=False)
            if of_one.any()
            for target in source.targets
        }
        return frozenset(lost.intersection(self.targets))

    def __getitem__(self, index: int) -> JoinedSample:
        [sample] = self._joined([(index, False)])
        return sample

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[JoinedSample] | Refused:
        """Return a batch of `RankBatches`, or of plain numbers, read from the store in one piece.

        In a data-loading worker an error of ours is returned, for `Refused.check` to raise in the main process: torch
        would raise another one, with the worker's traceback for a message.
        """
        try:
            return self._joined([(draw, False) if isinstance(draw, int) else draw for draw in draws])
        except (CacheError, PipelineError, OSError) as error:
            if get_worker_info() is None:
                raise
            return Refused(str(error))

    def _joined(self, draws: Sequence[Draw]) -> list[JoinedSample]:
        rows = [self.rows[index] for index, _ in draws]
        read = self._fetched([(index, row) for (index, _), row in zip(draws, rows, strict=True)])
        stored = self._stored(
            {row[1].key: (index, row) for (index, _), row in zip(draws, rows, strict=True)}, read
        )
        return [
            JoinedSample(
                entry.key,
                stored[entry.key].tokens,
                {digest: self._pixels(part, entry, n, read) for n, digest in self._images(entry)},
                tuple(digest for _, digest in self._images(entry)),
                stored[entry.key].arrays,
                self.lacking(index),
                is_filler,
            )
            for (index, is_filler), (part, entry) in zip(draws, rows, strict=True)
        ]

    def _images(self, entry: SampleEntry) -> list[tuple[int, str]]:
        """Return number and digest of each image whose pixels are read."""
        return list(enumerate(entry.images)) if self.reads_shards else []

    def _fetched(self, rows: Sequence[tuple[int, Row]]) -> SpanReader:
        """Return a reader that holds what a batch needs of shards behind URLs, fetched at once."""
        if not (self.has_remote and self.reads_shards):
            return self.read
        images: dict[str, Place] = {}  # by digest: one image is fetched once
        texts: list[Place] = []
        for index, (part, entry) in rows:
            for digest, span in zip(entry.images, entry.image_spans, strict=True):
                if digest not in self.pixels:
                    images.setdefault(digest, (self.shards[part], span))
            if entry.key not in self.stored and not (self.stores.read_alike and self.verified[index]):
                texts.append((self.shards[part], entry.json_span))
        return self.read.holding([*images.values(), *texts])

    def _stored(self, rows: Mapping[str, tuple[int, Row]], read: SpanReader) -> dict[str, StoredSample]:
        """Return the stored samples by key; those not in memory are read together."""
        found = {key: held for key in rows if (held := self.stored.get(key)) is not None}
        fresh = [key for key in rows if key not in found]
        for key, (tokens, arrays) in zip(fresh, self.stores.read_many(fresh, self.names), strict=True):
            found[key] = self.stored.put(key, self._checked(*rows[key], tokens, arrays, read))
        return found

    def _checked(
        self, index: int, row: Row, tokens: TokenizedSample, arrays: Arrays, read: SpanReader
    ) -> StoredSample:
        part, entry = row
        if not self.reads_shards:
            pass
        elif not self.stores.read_alike:
            tokens = own_text(self.shards[part], entry, tokens, self.preparation, self.targets, read=read)
        elif not self.verified[index]:
            compare_text(self.shards[part], entry, tokens, self.preparation, read=read)
            self.verified[index] = True
        arrays = by_image(arrays, self.targets, len(entry.images))
        if lacking := self.lacking(index):
            counts = Counts.of(pad_tokens([tokens], self.preparation.image_token_id))
            for name in lacking:
                facts = TeacherFacts.of(self.stores.giving(name).store.manifest)
                arrays |= self.targets[name].blank(facts, tokens.sizes, counts)
        return StoredSample(tokens, arrays)

    def _pixels(self, part: str, entry: SampleEntry, number: int, read: SpanReader) -> Pixels:
        digest = entry.images[number]
        if (known := self.pixels.get(digest)) is not None:
            return known
        made = read_pixels(self.shards[part], entry, number, self.preparation, read=read)
        return self.pixels.put(digest, Pixels(made))


def is_chosen(entry: SampleEntry, fraction: float) -> bool:
    """Whether `data.fraction` takes a sample: by its first image's digest, or its key's if it has no image.

    All samples of an image go together, and a smaller fraction is part of a larger one.
    """
    digest = entry.images[0] if entry.images else blake3(entry.key.encode()).hexdigest()
    return int(digest[:8], 16) < fraction * 2**32


@dataclass(frozen=True)
class JoinCollator:
    """Collates joined samples into the batch that `Distiller.forward` takes."""

    targets: Mapping[str, Target]
    image_token_id: int

    def __call__(self, samples: Sequence[JoinedSample] | Refused) -> dict[str, Any]:
        """Return a batch:

        `input_ids`, `attention_mask`, `labels`, `is_vision`  'B S', and `sizes` (see `pad_tokens`)
        `grids`          rows and columns of each sample's images (see `TokenizedSample`)
        `images`         the pixel inputs of all images in order, with `image_digests`
        `targets`        fields of `TeacherTargets`
        `received`       target -> rows that each sample has, int64 'B'
        `lacking`        target -> whether a sample has zeros in place of rows, bool 'B', where one has
        `is_filler`      see `RankBatches`
        """
        if isinstance(samples, Refused):
            return {"refused": samples.reason}
        batch = pad_tokens([sample.tokens for sample in samples], self.image_token_id)
        batch["grids"] = [sample.tokens.grids for sample in samples]
        batch["images"] = [sample.pixels[digest] for sample in samples for digest in sample.image_digests]
        batch["image_digests"] = [digest for sample in samples for digest in sample.image_digests]
        batch["is_filler"] = all(sample.is_filler for sample in samples)
        batch["targets"], batch["received"], batch["lacking"] = {}, {}, {}
        for name, target in self.targets.items():
            arrays = [sample.arrays for sample in samples]
            batch["targets"] |= target.collate(arrays)
            rows = torch.tensor([target.rows_in(of_sample) for of_sample in arrays])
            lacks = torch.tensor([name in sample.lacking for sample in samples])
            batch["received"][name] = rows.masked_fill(lacks, 0)
            if bool((needed := lacks & (rows > 0)).any()):
                batch["lacking"][name] = needed
        return batch
