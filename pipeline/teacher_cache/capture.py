"""Capture one shard into one part: longest samples first, in smaller batches where memory runs out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from blake3 import blake3

from cache import PartSummary, PartWriter, RefusedValue, SampleEntry, Span, StoreWriter, TakenKeys
from pipeline.config.config import Config
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.shard_files import OpenShard
from pipeline.data.shard_identity import source_of
from pipeline.data.shard_kinds import part_name
from pipeline.data.shards import Rejected, Sample, read_samples
from pipeline.errors import BadSample, ShardError
from pipeline.models.processors import Tensors
from pipeline.models.stub import Teacher
from pipeline.models.vlm import ImageFeatures
from pipeline.targets.target import Arrays
from pipeline.teacher_cache.ahead import Ahead
from pipeline.teacher_cache.captured_arrays import captured_arrays
from pipeline.teacher_cache.longest_first import Prepared, longest_first
from pipeline.teacher_cache.overlap import Behind
from pipeline.teacher_cache.progress import Progress

BATCHES_BEHIND = 2  # batches that are captured but not encoded yet, held in memory
DECODERS = min(8, os.cpu_count() or 1)
FIRST_BATCH_SIZE = {"cuda": 128, "cpu": 16}  # of `batch_size: auto`; it only ever falls


@dataclass(frozen=True)
class Captured:
    """A captured shard, before its part is published: all samples are in the part's writer, or rejected."""

    shard: str
    part: PartWriter
    open_part: ExitStack
    seen: int
    seconds: float

    def commit(self, capture: Capture, *, replace: bool = False, may_hold_fewer: bool = False) -> PartSummary:
        """Publish the part, without samples whose key another worker has cached meanwhile."""
        with self.open_part:
            for key, part in self.part.taken_elsewhere():
                self.part.withdraw(key, capture.reason_of(key, key_occurs_in(part), self.shard))
                capture.progress.reject()
            seconds = round(self.seconds, 3)
            return self.part.commit(
                seen=self.seen, seconds=seconds, replace=replace, may_hold_fewer=may_hold_fewer
            )


class Capture:
    """Captures shards one by one, each into its part.

    During the teacher's forward, other threads decode the images of the next batch and encode the values of the last.
    An out-of-memory batch is retried once, in case the allocator was fragmented. Then it is halved, as are all later
    batches. A sample that does not fit alone is rejected with its size.
    """

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        preparation: Preparation,
        progress: Progress,
        ahead: Ahead | None = None,
    ):
        self.config, self.teacher, self.preparation, self.progress = config, teacher, preparation, progress
        self.ahead = ahead or Ahead()
        asked = config.teacher.batch_size
        self.batch_size = FIRST_BATCH_SIZE.get(teacher.device.type, 16) if asked == "auto" else asked
        self._begin("")

    def _begin(self, shard: str) -> None:
        self.shard = shard
        self.opened: OpenShard
        # Vision features by image digest, of this batch and the last: samples of one image are neighbours.
        self.vision: dict[str, ImageFeatures] = {}
        self.pixels: dict[str, Future[Tensors]] = {}  # of images that are being decoded
        # Place -> key of an added sample, '' of a rejected one. A retried batch leaves these out.
        self.settled: dict[int, str] = {}
        self.starved: list[Prepared] = []  # captured, but memory ran out while their values were encoded

    def run(self, store: StoreWriter, shard: str, *, coming: str | None = None) -> Captured:
        """Capture a shard for `Captured.commit` to publish. After an exception nothing of it is published.

        The `coming` shard is fetched meanwhile, if it is behind a URL.
        """
        self._begin(shard)
        started = time.monotonic()
        with ExitStack() as stack, self.ahead.open(shard) as self.opened:
            part = stack.enter_context(store.part(part_name(shard)))
            prepared = longest_first(list(self._prepared(part, store.taken)))
            part.source = source_of(self.opened)
            self.ahead.fetch(coming)
            num_seen = len(prepared) + len(self.settled)
            if not num_seen:  # a file of zeros is a valid tar
                raise ShardError(
                    f"{shard} holds no sample; make or copy it again, or take it out of data.shards."
                )
            self.progress.begin_shard(shard, num_samples=num_seen, done=len(self.settled))
            with Behind(limit=BATCHES_BEHIND) as self.behind, ThreadPoolExecutor(DECODERS) as self.decoders:
                self._capture_all(prepared, part)
            self.progress.captured_shard()
            store.taken.expect(part_name(shard), [key for key in self.settled.values() if key])
            return Captured(shard, part, stack.pop_all(), num_seen, time.monotonic() - started)

    def _capture_all(self, prepared: Sequence[Prepared], part: PartWriter) -> None:
        start = 0
        while start < len(prepared):
            batch = prepared[start : start + self.batch_size]  # the size may fall in between
            start += len(batch)
            self._capture_or_halve(batch, prepared[start : start + self.batch_size], part)
            self.progress.advance(len(batch))
        self.behind.finish()
        starved, self.starved = self.starved, []
        for item in starved:  # each alone, with nothing else in memory
            self._capture_or_halve([item], [], part)
            self.behind.finish()
            if item.place not in self.settled:
                self._reject_too_large(item, part, "memory ran out while its values were encoded")

    def _prepared(self, part: PartWriter, taken: TakenKeys) -> Iterator[Prepared]:
        """Yield the usable samples of the shard, and reject the others."""
        items = read_samples(self.opened, max_pixels=self.config.data.max_image_pixels)
        for place, item in enumerate(items):
            try:
                if isinstance(item, Rejected):
                    raise BadSample(item.reason)
                yield self._prepare(place, item, taken)
            except BadSample as error:
                self._reject(part, place, item.key, error)

    def _prepare(self, place: int, sample: Sample, taken: TakenKeys) -> Prepared:
        if (part := taken.other_part(sample.key, than=part_name(self.shard))) is not None:
            raise key_occurs_in(part)
        sizes = self.preparation.sizes_of(sample.images)
        tokens = self.preparation.tokenize(sample.conversations, sizes)
        # The images of a shard may be gigabytes, so each batch reads its own again.
        return Prepared(place, replace(sample, images=()), tokens, len(tokens.input_ids))

    def _capture_or_halve(
        self, batch: Sequence[Prepared], coming: Sequence[Prepared], part: PartWriter
    ) -> None:
        for is_last_try in (False, True):
            try:
                return self._capture(batch, coming, part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
                self.behind.finish()  # until then `settled` may lack samples of earlier batches
                if is_last_try and len(batch) == 1:
                    return self._reject_too_large(batch[0], part, reason)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.batch_size = half = (len(batch) + 1) // 2
        self.progress.say(
            f"out of memory with {len(batch)} samples at once ({reason}); continuing with {half}"
        )
        for some in (batch[:half], batch[half:]):
            self._capture_or_halve(some, (), part)

    def _reject_too_large(self, item: Prepared, part: PartWriter, reason: str) -> None:
        images = len(item.sample.image_digests)
        size = f"{item.length} positions, {images} image{'' if images == 1 else 's'}: {reason}"
        self._reject(part, item.place, item.sample.key, BadSample("does not fit into memory", size))

    def _capture(self, batch: Sequence[Prepared], coming: Sequence[Prepared], part: PartWriter) -> None:
        """Run a batch through the teacher, and hand the captured values to the thread that encodes them."""
        batch = self._encode([item for item in batch if item.place not in self.settled], part)
        self._decode_ahead(coming)
        if not batch:
            return
        digests = [digest for item in batch for digest in item.sample.image_digests]
        features = ImageFeatures.joined([self.vision[digest] for digest in digests]) if digests else None
        targets = self.config.targets.cached()
        tokens, keys = [item.tokens for item in batch], [item.sample.key for item in batch]
        fresh = {digest: self.vision[digest] for digest in digests if not part.has_image(digest)}
        captured, kept = captured_arrays(
            self.teacher,
            targets,
            pad_tokens(tokens, self.preparation.image_token_id),
            features,
            keys=keys,
            keep=[one.flat for one in fresh.values()],
        )
        images = dict(zip(fresh, kept, strict=True))
        self.behind.do(lambda: self._add_all(batch, captured, images, part))

    def _add_all(
        self, batch: Sequence[Prepared], captured: list[Arrays], images: dict[str, Arrays], part: PartWriter
    ) -> None:
        """Encode a batch's values, in the thread behind."""
        try:
            for item, arrays in zip(batch, captured, strict=True):
                arrays |= {
                    "input_ids": np.array(item.tokens.input_ids),
                    "labels": np.array(item.tokens.labels),
                }
                self._add(item, arrays, images, part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Raised here, the error would appear in the next batch. These samples are captured again at the end.
            self.starved += [item for item in batch if item.place not in self.settled]

    def _encode(self, batch: Sequence[Prepared], part: PartWriter) -> list[Prepared]:
        """Fill `vision` for the batch, each distinct image once. Return the samples whose images can be decoded."""
        self._decode_ahead(batch)
        fresh: dict[str, tuple[Tensors, int]] = {}  # pixel inputs, and the number of vision tokens
        usable = []
        for item in batch:
            try:
                for digest, size in zip(item.sample.image_digests, item.tokens.sizes, strict=True):
                    if digest not in self.vision:
                        fresh[digest] = self.pixels[digest].result(), size
                usable.append(item)
            except BadSample as error:
                self.behind.do(partial(self._reject, part, item.place, item.sample.key, error))
        needed = {digest for item in usable for digest in item.sample.image_digests}
        kept = {digest: vision for digest, vision in self.vision.items() if digest in needed}
        if fresh := {digest: image for digest, image in fresh.items() if digest in needed}:
            pixels, sizes = zip(*fresh.values(), strict=True)
            features = self.teacher.encode_images(pixels, sizes)
            kept |= {digest: features.of([number]) for number, digest in enumerate(fresh)}
        self.vision, self.pixels = kept, {}
        return usable

    def _decode_ahead(self, batch: Sequence[Prepared]) -> None:
        """Start to decode the images of a batch that are not yet encoded or being decoded."""
        for item in batch:
            for digest, span in zip(item.sample.image_digests, item.sample.image_spans, strict=True):
                if digest not in self.vision and digest not in self.pixels:
                    self.pixels[digest] = self.decoders.submit(self._preprocess, digest, span)

    def _preprocess(self, digest: str, span: Span) -> Tensors:
        data = self.opened.read_span(span)
        if blake3(data).hexdigest() != digest:
            raise ShardError(
                f"{self.shard} changed while it was read: restore it, and run the command again."
            )
        return self.preparation.preprocess(data)

    def _add(self, item: Prepared, arrays: Arrays, images: dict[str, Arrays], part: PartWriter) -> None:
        sample = item.sample
        try:
            of_images = zip(sample.image_digests, item.tokens.sizes, item.tokens.grids, strict=True)
            for digest, size, grid in of_images:
                if not part.has_image(digest):
                    part.add_image(digest, images[digest], tokens=size, grid=grid)
            entry = SampleEntry(sample.key, sample.image_digests, sample.image_spans, sample.json_span)
            part.add(entry, arrays, order=item.place)
        except RefusedValue as error:
            self._reject(part, item.place, sample.key, BadSample("value that cannot be stored", str(error)))
        else:
            self.settled[item.place] = sample.key

    def reason_of(self, key: str, error: BadSample, shard: str) -> str:
        """Return why a sample is rejected. With `data.on_bad_sample: fail` raise it as `BadSample`."""
        if self.config.data.on_bad_sample == "fail":
            raise BadSample(
                "a bad sample, and data.on_bad_sample is fail",
                f"sample {key!r} of {shard}: {error.reason}",
            ) from error
        return error.reason

    def _reject(self, part: PartWriter, place: int, key: str, error: BadSample) -> None:
        part.reject(key, self.reason_of(key, error, self.shard), order=place)
        self.settled[place] = ""
        self.progress.reject()


def key_occurs_in(part: str) -> BadSample:
    """Return the rejection of a sample whose key another part holds. Stage 2 joins by key: it must be unique."""
    return BadSample("key occurs in another shard", f"the part {part} holds it")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed on any device. torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
