"""`alignkd plan`: what a store will take, from a probe of real samples, before anything is written.

The probe goes through stage 1 itself, into a temporary store: so its bytes are those of the codecs, its speed that of
this machine. What a part's files take whatever it holds, and what they take for each sample, are told apart.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cache import CODECS, PartSizes, part_sizes
from pipeline.config.config import Config
from pipeline.data.pairing import check_student
from pipeline.data.shards import Sample, part_name, read_shard
from pipeline.errors import ConfigError, writing
from pipeline.targets.target import TeacherFacts
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture, write_parts
from pipeline.upkeep.plan_costs import Costs, measure_costs

PROBED_SHARDS = 8
TAR_BLOCK = 512
# A target of a sample from LARGE_BYTES on is made again even if that takes a few times as long as to read it: a
# student is longer at work on the sample, and the disk is not free.
LARGE_BYTES = 100_000
PATIENCE = 4


@dataclass(frozen=True)
class TargetPlan:
    """A target: bytes for a sample and in all, its stated errors, and whether to store it or make it again."""

    name: str
    source: str
    bytes_per_sample: float
    total_bytes: float
    stated_errors: dict[str, str]
    reading_seconds: (
        float  # of a sample, by one process, from the disk that will hold the store; 0 if none is stored
    )
    forward_seconds: float  # of the stub that makes it again, a sample; 0 if none can
    advice: str


@dataclass(frozen=True)
class StorePlan:
    """What stage 1 will write. `num_samples_known`: counted when packed; else estimated from the shards' bytes."""

    path: str
    num_shards: int
    num_samples: int
    num_samples_known: bool
    probed_samples: int
    bytes_per_sample: float
    total_bytes: float
    free_bytes: int
    seconds: float
    targets: tuple[TargetPlan, ...]
    settings: dict[str, Any]  # overrides of the config that make it so; {} for the config as it is

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}


def plan_store(config: Config, *, num_samples: int = 256) -> StorePlan:
    """Probe and extrapolate. Raises what stage 1 would raise of the config, the shards and the models."""
    check_student(config)
    return _plan(config, num_samples=num_samples, stubs={})


def _plan(config: Config, *, num_samples: int, stubs: dict[str, float]) -> StorePlan:
    """`stubs` as `known` in `measure_costs`."""
    plan = plan_capture(config)
    with tempfile.TemporaryDirectory(prefix=".alignkd-plan-", dir=_disk_of(config.one_cache.path)) as folder:
        probe = _probe(plan, Path(folder), num_samples=num_samples, stubs=stubs)
        return _extrapolate(plan, probe)


def plan_within(config: Config, *, max_bytes: float, num_samples: int = 256) -> StorePlan:
    """The first that fits of ever cheaper settings, those of the config first. Raises `ConfigError` if none does."""
    check_student(config)
    smallest, stubs = None, dict[str, float]()
    for settings in cheaper_settings(config):
        plan = _plan(_with(config, settings), num_samples=num_samples, stubs=stubs)
        plan = replace(plan, settings=settings)
        if plan.total_bytes <= max_bytes:
            return plan
        smallest = plan if smallest is None or plan.total_bytes < smallest.total_bytes else smallest
    assert smallest is not None
    raise ConfigError(
        f"--max-bytes: even with {_spelled(smallest.settings)} the store takes {smallest.total_bytes:,.0f} bytes, "
        f"not {max_bytes:,.0f}; cache fewer shards, or give it more room"
    )


def cheaper_settings(config: Config) -> Iterator[dict[str, Any]]:
    """Overrides of the config, each set smaller on the disk than the one before; {} first."""
    active = config.targets.active()
    settings: dict[str, Any] = {}
    yield {}
    steps: list[dict[str, Any]] = []
    if "attention" in active:
        steps.append({"targets.attention.source": "recompute"})
    if "vision" in active:
        steps += [{"targets.vision.codec": "int8"}, {"targets.vision.source": "recompute"}]
    if "logits" in active:
        if active["logits"].tail_samples:
            steps.append({"targets.logits.tail_samples": 0})
        steps += [{"targets.logits.top_k": k} for k in (16, 8) if k < active["logits"].top_k]
    for step in steps:
        settings = {**settings, **step}
        yield settings


@dataclass(frozen=True)
class Probe:
    """Parts of a few shards' first samples, and the bytes of the shards that these samples take."""

    parts: list[PartSizes]
    shard_bytes: int
    store_bytes: int  # of the manifest and the groups' metadata
    costs: Mapping[str, Costs]  # of the targets that can be made again

    def each(self, of_part: Callable[[PartSizes], float]) -> float:
        """Mean over samples."""
        return sum(map(of_part, self.parts)) / max(1, sum(part.samples for part in self.parts))


def _probe(plan: CapturePlan, folder: Path, *, num_samples: int, stubs: dict[str, float]) -> Probe:
    """Stage 1 of the first samples of a few shards, into a store that is thrown away."""
    shards = _evenly(plan.shards, PROBED_SHARDS)
    heads = [_head(shard, folder, max(1, num_samples // len(shards))) for shard in shards]
    manifest = replace(plan.manifest, planned_parts=tuple(part_name(head) for head in heads))
    config = _with(plan.config, {"cache.path": str(folder / "probe.zarr"), "data.shards": heads})
    with redirect_stderr(io.StringIO()):  # the probe's own progress would be taken for stage 1's
        write_parts(replace(plan, config=config, shards=tuple(heads), manifest=manifest))
    store = folder / "probe.zarr"
    documents = [*store.glob("*.json"), *store.glob("parts/*.json")]
    return Probe(
        parts=part_sizes(store),
        shard_bytes=sum(Path(head).stat().st_size for head in heads),
        store_bytes=sum(file.stat().st_size for file in documents),
        costs=measure_costs(plan, store, heads, known=stubs),
    )


def _head(shard: str, folder: Path, num_samples: int) -> str:
    """A tar of a shard's first samples, as they stand there."""
    end = 0
    for item in islice(read_shard(shard), num_samples):
        if isinstance(item, Sample):
            end = max(end, *(span.offset + span.size for span in (item.json_span, *item.image_spans)))
    target = folder / Path(shard).name
    with writing(target), open(shard, "rb") as whole:
        target.write_bytes(whole.read(-(-end // TAR_BLOCK) * TAR_BLOCK) + bytes(2 * TAR_BLOCK))
    return str(target)


def _extrapolate(plan: CapturePlan, probe: Probe) -> StorePlan:
    counted = _counted_samples(plan.shards)
    shard_bytes = sum(Path(shard).stat().st_size for shard in plan.shards)
    seen = sum(part.samples + part.rejected for part in probe.parts)
    num_samples = counted if counted is not None else round(shard_bytes * seen / probe.shard_bytes)
    cached = num_samples * (seen - sum(part.rejected for part in probe.parts)) / max(1, seen)
    fixed = len(plan.shards) * sum(part.fixed_bytes for part in probe.parts) / len(probe.parts)
    total = (
        probe.store_bytes
        + fixed
        + cached * probe.each(lambda part: part.other_bytes + sum(part.array_bytes.values()))
    )
    seconds_each = probe.each(lambda part: part.seconds or 0.0)
    return StorePlan(
        path=plan.config.one_cache.path,
        num_shards=len(plan.shards),
        num_samples=num_samples,
        num_samples_known=counted is not None,
        probed_samples=seen,
        bytes_per_sample=total / max(1.0, cached),
        total_bytes=total,
        free_bytes=shutil.disk_usage(_existing(Path(plan.config.one_cache.path))).free,
        seconds=num_samples * seconds_each,
        targets=tuple(_targets(plan, probe, cached)),
        settings={},
    )


def _targets(plan: CapturePlan, probe: Probe, num_samples: float) -> Iterator[TargetPlan]:
    for name, target in plan.config.targets.active().items():
        specs = target.arrays(plan.teacher.facts)
        is_cached = name in plan.config.targets.cached()
        each = (
            probe.each(lambda part, s=specs: sum(part.array_bytes[x.name] for x in s)) if is_cached else 0.0
        )
        costs = probe.costs.get(name, Costs(0, 0))
        yield TargetPlan(
            name=name,
            source="cache" if is_cached else "recompute",
            bytes_per_sample=each,
            total_bytes=each * num_samples,
            stated_errors={s.name: CODECS[s.codec].stated_error(s.options) for s in specs}
            if is_cached
            else {},
            reading_seconds=costs.reading_seconds,
            forward_seconds=costs.forward_seconds,
            advice=advice(costs, bytes_each=each, depth=target.deepest, facts=plan.teacher.facts),
        )


def advice(costs: Costs, *, bytes_each: float, depth: int | None, facts: TeacherFacts) -> str:
    """Store or recompute, by what was measured of a sample either way; `depth` as in `Target.deepest`."""
    if depth is None:
        return "store: it needs the whole teacher"
    runs = f"the tower, the projector and {max(depth, 0)} of {facts.num_layers} layers"
    again = f"{1000 * costs.forward_seconds:.2f} ms to make it again ({runs})"
    if not bytes_each:
        return f"recompute: no bytes; {again}"
    patience = PATIENCE if bytes_each > LARGE_BYTES else 1
    choice = "recompute" if costs.forward_seconds <= patience * costs.reading_seconds else "store"
    return f"{choice}: {1000 * costs.reading_seconds:.2f} ms to read a sample, {again}"


def _counted_samples(shards: Sequence[str]) -> int | None:
    """By the pack.json beside the shards; None if one of them is not in one."""
    counts: dict[str, int] = {}
    for folder in {Path(shard).parent for shard in shards}:
        try:
            packed = json.loads((folder / "pack.json").read_text())["shards"]
            counts |= {str(folder / shard["name"]): int(shard["num_samples"]) for shard in packed}
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return (
        sum(counts[str(Path(shard))] for shard in shards)
        if all(str(Path(s)) in counts for s in shards)
        else None
    )


def _with(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with `section.key` set; checked as a whole again."""
    values = config.model_dump()
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return Config.model_validate(values)


def _evenly(shards: Sequence[str], count: int) -> list[str]:
    count = min(count, len(shards))
    return [shards[number * len(shards) // count] for number in range(count)]


def _disk_of(store: str) -> str | None:
    """A folder on the disk that will hold the store, so that reading is measured there; None if it cannot be."""
    folder = _existing(Path(store).absolute().parent)
    return str(folder) if folder.is_dir() and os.access(folder, os.W_OK) else None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _spelled(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items()) or "the config as it is"
