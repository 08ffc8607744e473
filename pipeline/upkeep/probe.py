"""The probe of `alignkd plan`: stage 1 itself on a few shards' first samples, into a temporary store."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cache import PartSizes, Store, part_sizes
from pipeline.config.config import Config, overridden
from pipeline.data.shard_files import open_shard
from pipeline.data.shard_kinds import part_name
from pipeline.data.shards import Sample, read_samples
from pipeline.errors import writing
from pipeline.progress import Progress
from pipeline.teacher_cache.teacher import CapturePlan, write_parts
from pipeline.upkeep.agreement import Agreement, agreement_in
from pipeline.upkeep.plan_costs import Costs, measure_costs
from pipeline.upkeep.slices import evenly

PROBED_SHARDS = 8
TAR_BLOCK = 512


@dataclass(frozen=True)
class Probe:
    """Parts of a few shards' first samples, and the bytes of the shards that these samples take."""

    parts: list[PartSizes]
    shard_bytes: int
    store_bytes: int  # of the manifest and the groups' metadata
    costs: Mapping[str, Costs]  # of the targets that can be recomputed
    agreement: Agreement | None
    rejects: Counter[str]  # of all samples that were read, by reason

    def mean(self, of_part: Callable[[PartSizes], float]) -> float:
        """Return a part's number for each sample, over all parts."""
        return sum(map(of_part, self.parts)) / max(1, sum(part.samples for part in self.parts))


def make_probe(
    plan: CapturePlan, folder: Path, *, num_samples: int, stubs: dict[str, float], progress: Progress
) -> Probe:
    """Run stage 1 on the first samples of a few shards, into a store in `folder`."""
    shards = evenly(plan.shards, PROBED_SHARDS)
    progress.step(f"probing {num_samples:,} samples of {len(shards)} shards with the teacher")
    copied = [_head(shard, folder, max(1, num_samples // len(shards))) for shard in shards]
    rejects = Counter(reason for _, _, reasons in copied for reason in reasons)
    heads, total = [head for head, number, _ in copied if number], sum(number for _, number, _ in copied)
    if not heads:
        return Probe([], 0, 0, {}, None, rejects)
    manifest = replace(plan.manifest, planned_parts=tuple(part_name(head) for head in heads))
    path = folder / "probe.zarr"
    config = with_settings(
        plan.config, {"cache.path": str(path), "data.shards": heads, "data.held_out_shards": None}
    )
    with redirect_stderr(io.StringIO()):  # the probe's own progress bar would look like stage 1's
        write_parts(
            replace(plan, config=config, shards=tuple(heads), manifest=manifest),
            count=lambda done: progress(done, total),
        )
    progress.step("measuring how long reading and recomputing take")
    documents, store = [*path.glob("*.json"), *path.glob("parts/*.json")], Store(path)
    return Probe(
        parts=part_sizes(path),
        shard_bytes=sum(Path(head).stat().st_size for head in heads),
        store_bytes=sum(file.stat().st_size for file in documents),
        costs=measure_costs(plan, path, heads, known=stubs),
        agreement=agreement_in(store, num_samples=None),
        rejects=rejects + Counter(reason for part in store.parts for _, reason in store.rejects(part)),
    )


def _head(shard: str, folder: Path, num_samples: int) -> tuple[str, int, list[str]]:
    """Copy a shard's first samples, byte for byte, into a tar in `folder`; return it, and their number.

    Also return why unusable samples after the last usable one, which are not copied, are rejected.
    """
    end = number = 0
    left_out: list[str] = []
    with open_shard(shard) as opened:
        for place, item in enumerate(islice(read_samples(opened), num_samples), start=1):
            if isinstance(item, Sample):
                end = max(end, *(span.offset + span.size for span in (item.json_span, *item.image_spans)))
                number, left_out = place, []
            else:
                left_out.append(item.reason)
        target = folder / f"{part_name(shard)}.tar"
        size = -(-end // TAR_BLOCK) * TAR_BLOCK
        with writing(target):
            target.write_bytes(opened.read_at(0, size) + bytes(2 * TAR_BLOCK))
    return str(target), number, left_out


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with `section.key` set, checked as a whole."""
    return overridden(config, [f"{key}={json.dumps(value)}" for key, value in settings.items()], where="plan")
