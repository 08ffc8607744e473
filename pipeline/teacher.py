"""Stage 1: shards -> teacher -> store. One tar shard in, one immutable part out; every sample cached or rejected."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from cache import (
    FORMAT_VERSION,
    ArraySpec,
    Fingerprint,
    Manifest,
    PartSummary,
    PartWriter,
    RefusedValue,
    SampleEntry,
    Store,
    StoreWriter,
    digest_of,
)
from pipeline.config import Config
from pipeline.conversation import TokenizedSample
from pipeline.errors import BadSample, ConfigError, ShardError
from pipeline.inputs import Preparation, capture_settings, pad_tokens
from pipeline.models.stub import Teacher, TeacherPlan, load_teacher, plan_teacher
from pipeline.progress import Progress
from pipeline.provenance import provenance
from pipeline.shards import Rejected, Sample, expand_shards, read_shard
from pipeline.targets import TARGETS, vision_array

TOKEN_ARRAYS = (
    ArraySpec("input_ids", "S", (), "sample", "integer", {"dtype": "int32"}),
    ArraySpec("labels", "S", (), "sample", "integer", {"dtype": "int32"}),
)


@dataclass(frozen=True)
class CacheSummary:
    """What a run of stage 1 did: parts written now and found done, and the samples of those written now.

    `broken` says of each shard that could not be read what is wrong with it; it has no part.
    """

    path: str
    parts_written: int
    parts_found: int
    seen: int
    cached: int
    rejected: int
    bytes_written: int
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A sample ready for the teacher."""

    sample: Sample
    tokens: TokenizedSample


def cache_teacher(config: Config) -> CacheSummary:
    """Write every part of the store that is not there yet; the teacher is loaded only if one is missing.

    A shard that cannot be read is left out and told in the summary; the others are cached all the same.
    Raises `FingerprintMismatch` if the store holds something else, before anything is written.
    """
    shards = expand_shards(config.data.shards)
    preparation = Preparation.of(config.teacher.model, config.data)
    plan = plan_teacher(config.teacher.model, targets=config.targets.active())
    dtype, device = _compute_dtype(config, plan), _device(config.teacher.device)
    manifest = build_manifest(config, plan, preparation, dtype=dtype, parts=[_part_name(s) for s in shards])
    store = StoreWriter.open(config.cache.path, manifest)
    todo = [shard for shard in shards if not store.is_done(_part_name(shard))]
    summaries: list[PartSummary] = []
    broken: list[str] = []
    if todo:
        cached = _keys_of_finished_parts(config.cache.path)
        teacher = load_teacher(plan, dtype=dtype, device=_usable(device))
        with Progress(todo, description="teacher-cache") as progress:
            for shard in todo:
                capture = ShardCapture(config, teacher, preparation, progress, cached)
                try:
                    summaries.append(capture.run(store, shard))
                except ShardError as error:
                    if config.data.on_bad_sample == "fail":
                        raise
                    broken.append(str(error))
    return _summary(config, summaries, parts_found=len(shards) - len(todo), broken=broken)


def build_manifest(
    config: Config, plan: TeacherPlan, preparation: Preparation, *, dtype: torch.dtype, parts: Sequence[str]
) -> Manifest:
    """What the store will say of itself, before anything is captured."""
    capture = capture_settings(config, dtype=str(dtype).removeprefix("torch."))
    arrays = [
        array
        for name, settings in config.targets.active().items()
        for array in TARGETS[name].arrays(settings, plan.facts)
    ]
    return Manifest(
        format_version=FORMAT_VERSION,
        fingerprint=Fingerprint(teacher=plan.digest, capture=digest_of(capture), **preparation.digests()),
        arrays=(*TOKEN_ARRAYS, *arrays),
        teacher=asdict(plan.facts) | {"num_tensors_used": len(plan.tensors), "is_stub": plan.is_stub},
        capture=capture,
        provenance=provenance(config),
        planned_parts=tuple(parts),
    )


class ShardCapture:
    """One shard through the teacher, batch by batch, into one part. `cached`: the parts' names by sample key."""

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        preparation: Preparation,
        progress: Progress,
        cached: dict[str, str],
    ):
        self.config = config
        self.teacher = teacher
        self.preparation = preparation
        self.progress = progress
        self.cached = cached
        self.keys: list[str] = []
        self.shard = ""
        self.num_seen = 0
        # Vision tokens of the images of the batch at hand and of the one before: samples of one image are neighbours.
        self.vision: dict[str, torch.Tensor] = {}
        self.pixels: dict[str, torch.Tensor] = {}

    def run(self, store: StoreWriter, shard: str) -> PartSummary:
        """Commit the shard's part; on any exception nothing of it is published."""
        self.shard = shard
        started = time.monotonic()
        self.progress.begin_shard(shard)
        source = {"shard": Path(shard).name, "bytes": Path(shard).stat().st_size}
        with store.part(_part_name(shard), source=source) as part:
            for batch in _batches(self._prepared(shard, part), self.config.teacher.batch_size):
                self._capture(batch, part)
            if not self.num_seen:  # a file of nothing but zeros is a tar, too
                raise ShardError(
                    f"{shard} holds no sample; make or copy it again, or take it out of data.shards."
                )
            seconds = round(time.monotonic() - started, 3)
            summary = part.commit(seen=self.num_seen, seconds=seconds)
        self.cached |= dict.fromkeys(self.keys, _part_name(shard))
        self.progress.end_shard(summary)
        return summary

    def _prepared(self, shard: str, part: PartWriter) -> Iterator[Prepared]:
        """The shard's usable samples; the others are rejected here."""
        for item in read_shard(shard, max_pixels=self.config.data.max_image_pixels):
            self.num_seen += 1
            try:
                if isinstance(item, Rejected):
                    raise BadSample(item.reason)
                yield self._prepare(item)
            except BadSample as error:
                self._reject(part, item.key, error)
            self.progress.advance(item)

    def _prepare(self, sample: Sample) -> Prepared:
        if (part := self.cached.get(sample.key)) is not None:
            raise BadSample("key occurs in another shard", f"the part {part} holds it")
        tokens = self.preparation.tokenize(sample.conversations)
        for digest, data in zip(sample.image_digests, sample.images, strict=True):
            if digest not in self.vision and digest not in self.pixels:
                self.pixels[digest] = self.preparation.preprocess(data)
        return Prepared(sample, tokens)

    def _capture(self, batch: list[Prepared], part: PartWriter) -> None:
        """Forward a batch and add each sample's rows; a sample whose values a codec refuses is rejected."""
        vision = self._encode(batch)
        forward = self.teacher.forward(**pad_tokens([item.tokens for item in batch]), vision=vision)
        captured = [
            capture(settings, forward)
            for name, settings in self.config.targets.active().items()
            if (capture := TARGETS[name].capture) is not None
        ]
        for index, item in enumerate(batch):
            arrays = {"input_ids": np.array(item.tokens.input_ids), "labels": np.array(item.tokens.labels)}
            for samples in captured:
                arrays |= samples[index]
            self._add(item, arrays, part)

    def _add(self, item: Prepared, arrays: dict[str, np.ndarray], part: PartWriter) -> None:
        sample = item.sample
        try:
            for digest in sample.image_digests:
                if not part.has_image(digest):
                    part.add_image(digest, self._image_arrays(digest))
            part.add(
                SampleEntry(sample.key, sample.image_digests, sample.image_spans, sample.json_span), arrays
            )
            self.keys.append(sample.key)
        except RefusedValue as error:
            self._reject(part, sample.key, BadSample("value that cannot be stored", str(error)))

    def _image_arrays(self, digest: str) -> dict[str, np.ndarray]:
        return vision_array(self.vision[digest]) if "vision" in self.config.targets.active() else {}

    def _encode(self, batch: list[Prepared]) -> torch.Tensor | None:
        """Vision tokens 'I N D' of the batch's images in order, each distinct image encoded once."""
        digests = [digest for item in batch for digest in item.sample.image_digests]
        kept = {digest: self.vision[digest] for digest in digests if digest in self.vision}
        fresh = [digest for digest in dict.fromkeys(digests) if digest not in kept]
        if fresh:
            encoded = self.teacher.encode_images(torch.stack([self.pixels[digest] for digest in fresh]))
            kept |= dict(zip(fresh, encoded, strict=True))
        self.vision, self.pixels = kept, {}
        return torch.stack([kept[digest] for digest in digests]) if digests else None

    def _reject(self, part: PartWriter, key: str, error: BadSample) -> None:
        if self.config.data.on_bad_sample == "fail":
            raise BadSample(
                "a bad sample, and data.on_bad_sample is fail",
                f"sample {key!r} of {self.shard}: {error.reason}",
            ) from error
        part.reject(key, error.reason)
        self.progress.reject()


def _keys_of_finished_parts(path: str) -> dict[str, str]:
    """Sample key -> part, of what earlier runs have cached: the join is by key, so a key occurs once in a store."""
    store = Store(path)
    return {entry.key: part for part in store.parts for entry in store.entries(part)}


def _batches(items: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _part_name(shard: str) -> str:
    return Path(shard).name.removesuffix(".tar")


def _device(name: str) -> torch.device:
    try:
        return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        raise ConfigError(f"teacher.device: {name!r} is no device; use auto, cpu, cuda or cuda:1") from error


def _usable(device: torch.device) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts, CUDA without a GPU raises
        reason = str(error).splitlines()[0]
        raise ConfigError(f"teacher.device: {device} cannot be used here ({reason}); use auto") from error
    return device


def _compute_dtype(config: Config, plan: TeacherPlan) -> torch.dtype:
    """The dtype asked for; `auto` is the checkpoint's own on a GPU and float32 on a CPU, which has no other speed."""
    if config.teacher.dtype != "auto":
        return getattr(torch, config.teacher.dtype)
    if _device(config.teacher.device).type == "cpu":
        return torch.float32
    stored = plan.config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _summary(
    config: Config, summaries: Sequence[PartSummary], *, parts_found: int, broken: Sequence[str]
) -> CacheSummary:
    return CacheSummary(
        path=config.cache.path,
        parts_written=len(summaries),
        parts_found=parts_found,
        seen=sum(s.seen for s in summaries),
        cached=sum(s.cached for s in summaries),
        rejected=sum(s.rejected for s in summaries),
        bytes_written=sum(sum(s.array_bytes.values()) for s in summaries),
        broken=tuple(broken),
    )
