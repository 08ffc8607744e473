"""`alignkd plan`: estimate a store's size and stage 1's time from a probe of real samples.

The probe runs stage 1 itself into a temporary store, so that bytes are those of the codecs and speed is that of this
machine. Bytes that a part takes whatever it holds are separated from those that grow with its samples.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cache import CODECS
from pipeline.config.config import Config
from pipeline.data.pairing import check_student
from pipeline.data.shard_files import ShardFacts, open_shard
from pipeline.data.shard_kinds import is_local_tar
from pipeline.data.spans import warn_of_streams
from pipeline.errors import ConfigError
from pipeline.progress import Progress
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture
from pipeline.upkeep.agreement import Agreement
from pipeline.upkeep.plan_costs import Costs, advice, what_recomputes
from pipeline.upkeep.probe import PROBED_SHARDS, Probe, make_probe, with_settings
from pipeline.upkeep.slices import evenly


@dataclass(frozen=True)
class TargetPlan:
    """A target's bytes, stated errors, and the advice to store or recompute it.

    Seconds are of one sample: `reading_seconds` by one process, from the disk that will hold the store (0 if it is
    not stored); `forward_seconds` of the stub that recomputes it (0 if none can).
    """

    name: str
    source: str
    bytes_per_sample: float
    total_bytes: float
    stated_errors: dict[str, str]
    reading_seconds: float
    forward_seconds: float
    advice: str


@dataclass(frozen=True)
class StorePlan:
    """What stage 1 will write. Samples are counted if `num_samples_known`, else estimated from the shards' bytes."""

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
    settings: dict[str, Any]  # the overrides of the config that it is for
    agreement: Agreement | None = None  # of the probed samples; None without logits
    probed_rejects: dict[str, int] = field(default_factory=dict)  # of the probed samples, by reason

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes

    @property
    def is_known(self) -> bool:
        """Whether a probed sample could be used: else all figures are 0."""
        return sum(self.probed_rejects.values()) < self.probed_samples

    def to_json(self) -> dict[str, Any]:
        found = self.agreement.to_json() if self.agreement else None
        return asdict(self) | {"agreement": found, "fits": self.fits}


def plan_store(
    config: Config,
    *,
    num_samples: int = 256,
    progress: Progress | None = None,
    checks_student: bool = True,
) -> StorePlan:
    """Probe `num_samples` and extrapolate. Raises what stage 1 would raise of config, shards and models.

    `progress` receives what is done next, and how many samples were probed. Whoever checked the student, or will make
    it only then, needs no check.
    """
    if checks_student:
        check_student(config)
    return _plan(config, {}, num_samples=num_samples, stubs={}, progress=progress or _unseen())


def plan_within(
    config: Config, *, max_bytes: float, num_samples: int = 256, progress: Progress | None = None
) -> StorePlan:
    """Return the plan of the first of `cheaper_settings` that fits. Raises `ConfigError` if none does."""
    check_student(config)
    progress = progress or _unseen()
    plans, stubs = [], dict[str, float]()
    for settings in cheaper_settings(config):
        plans.append(_plan(config, settings, num_samples=num_samples, stubs=stubs, progress=progress))
        if plans[-1].total_bytes <= max_bytes:
            return plans[-1]
    smallest = min(plans, key=lambda plan: plan.total_bytes)
    settings = " ".join(f"{key}={value}" for key, value in smallest.settings.items())
    raise ConfigError(
        f"--max-bytes: even with {settings or 'the config as it is'} the store takes {smallest.total_bytes:,.0f} "
        f"bytes, not {max_bytes:,.0f}; cache fewer shards, or give it more room"
    )


def _unseen() -> Progress:
    return Progress("plan", unit="samples", doing="")


def cheaper_settings(config: Config) -> Iterator[dict[str, Any]]:
    """Yield overrides of the config, each for a smaller store than the one before; {} first."""
    active = config.targets.active()
    steps: list[dict[str, Any]] = [{}]
    if "hidden_states" in active:
        steps.append({"targets.hidden_states.source": "recompute"})
    if "attention" in active:
        steps.append({"targets.attention.source": "recompute"})
    if "vision" in active:
        steps += [{"targets.vision.codec": "int8"}, {"targets.vision.source": "recompute"}]
    if "logits" in active:
        if active["logits"].tail_samples:
            steps.append({"targets.logits.tail_samples": 0})
        steps += [{"targets.logits.top_k": k} for k in (16, 8) if k < active["logits"].top_k]
    if "final_hidden" in active:  # last: the whole teacher is in memory then
        steps.append({"targets.final_hidden.source": "recompute"})
    settings: dict[str, Any] = {}
    for step in steps:
        settings = settings | step
        yield settings


def _plan(
    config: Config, settings: dict[str, Any], *, num_samples: int, stubs: dict[str, float], progress: Progress
) -> StorePlan:
    """The plan with overrides; `stubs` as `known` in `measure_costs`."""
    overrides = "".join(f", {key}={value}" for key, value in settings.items())
    progress.step(f"reading the shards' and the teacher's metadata{overrides}")
    plan = plan_capture(with_settings(config, settings))
    if not settings:  # the first of several plans
        warn_of_streams(plan.shards)
    # Below the store's own folder, if that can be written: reading is then measured on the disk that will hold it.
    place = _existing(Path(config.one_cache.path).absolute().parent)
    place = place if place.is_dir() and os.access(place, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".alignkd-plan-", dir=place) as folder:
        probe = make_probe(plan, Path(folder), num_samples=num_samples, stubs=stubs, progress=progress)
        return _extrapolate(plan, probe, settings)


def _extrapolate(plan: CapturePlan, probe: Probe, settings: dict[str, Any]) -> StorePlan:
    rejected = probe.rejects.total()
    seen = sum(part.samples for part in probe.parts) + rejected
    copied = sum(part.samples + part.rejected for part in probe.parts)
    counted = _counted_samples(plan.shards)
    shard_bytes = estimated_bytes(plan.shards)
    num_samples = counted if counted is not None else round(shard_bytes * copied / max(1, probe.shard_bytes))
    cached = num_samples * (seen - rejected) / max(1, seen)
    fixed = len(plan.shards) * sum(part.fixed_bytes for part in probe.parts) / max(1, len(probe.parts))
    each = probe.mean(lambda part: part.other_bytes + sum(part.array_bytes.values()))
    total = probe.store_bytes + fixed + cached * each
    path = plan.config.one_cache.path
    return StorePlan(
        path=path,
        num_shards=len(plan.shards),
        num_samples=num_samples,
        num_samples_known=counted is not None,
        probed_samples=seen,
        bytes_per_sample=total / max(1.0, cached),
        total_bytes=total,
        free_bytes=shutil.disk_usage(_existing(Path(path))).free,
        seconds=num_samples * probe.mean(lambda part: part.seconds or 0.0),
        targets=tuple(_targets(plan, probe, cached)),
        settings=settings,
        agreement=probe.agreement,
        probed_rejects=dict(probe.rejects.most_common()),
    )


def estimated_bytes(shards: Sequence[str]) -> float:
    """Return the bytes of the shards' tars.

    The size of a compressed one, or of what a command prints, is known when it is read: a few are, to their ends.
    """
    sizes = [ShardFacts.of(shard).size for shard in shards]
    unknown = [shard for shard, size in zip(shards, sizes, strict=True) if size is None]
    read = [_read_size(shard) for shard in evenly(unknown, PROBED_SHARDS)]
    return sum(size or 0 for size in sizes) + len(unknown) * sum(read) / max(1, len(read))


def _read_size(shard: str) -> int:
    with open_shard(shard) as opened:
        return opened.file.seek(0, os.SEEK_END)


def _targets(plan: CapturePlan, probe: Probe, num_samples: float) -> Iterator[TargetPlan]:
    facts = plan.teacher.facts
    for name, target in plan.config.targets.active().items():
        is_cached = name in plan.config.targets.cached()
        stored = target.arrays(facts) if is_cached else []
        each = probe.mean(lambda part, specs=stored: sum(part.array_bytes[spec.name] for spec in specs))
        costs = probe.costs.get(name, Costs(0, 0))
        yield TargetPlan(
            name=name,
            source="cache" if is_cached else "recompute",
            bytes_per_sample=each,
            total_bytes=each * num_samples,
            stated_errors={spec.name: CODECS[spec.codec].stated_error(spec.options) for spec in stored},
            reading_seconds=costs.reading_seconds,
            forward_seconds=costs.forward_seconds,
            advice=advice(costs, bytes_each=each, runs=what_recomputes(target, facts)),
        )


def _counted_samples(shards: Sequence[str]) -> int | None:
    """The shards' samples by the `pack.json` beside each; None if one of them is not listed."""
    counts: dict[str, int] = {}
    try:
        if not all(map(is_local_tar, shards)):
            return None
        for folder in {Path(shard).parent for shard in shards}:
            packed = json.loads((folder / "pack.json").read_text())["shards"]
            counts |= {str(folder / shard["name"]): int(shard["num_samples"]) for shard in packed}
        return sum(counts[str(Path(shard))] for shard in shards)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
