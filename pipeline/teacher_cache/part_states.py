"""Which shards stage 1 must capture: those without a part and, on request, those that changed since."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from cache import CacheError, StoreWriter
from pipeline.data.shard_identity import shard_change
from pipeline.data.shard_kinds import part_name
from pipeline.errors import ShardError


@dataclass
class PartStates:
    """The planned shards of a store, each with the state of its part.

    Parts in `recapture` are always captured again. `recapture_changed` adds the parts whose shard changed. `refused`
    and `changed` collect, by shard, why a part is neither done nor captured.
    """

    store: StoreWriter
    shards: tuple[str, ...]
    recapture: Collection[str] = ()
    recapture_changed: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shard_of = {part_name(shard): shard for shard in self.shards}

    def needs_capture(self, shard: str) -> bool:
        """Whether the part of the shard must be written. A part that cannot be read is left unchanged and noted."""
        part = part_name(shard)
        if part in self.recapture:
            return True
        try:
            record = self.store.record(part)
            change = record and shard_change(shard, record.source, read_through=self.recapture_changed)
        except (CacheError, ShardError, OSError) as error:
            self.refused[shard] = str(error)
            return False
        if change is None:
            return record is None
        if not self.recapture_changed:
            self.changed[shard] = change
        return self.recapture_changed

    def replaces(self, shard: str) -> bool:
        """Whether the shard's new part replaces an existing one."""
        return part_name(shard) in self.recapture or (
            self.recapture_changed and self.store.record(part_name(shard)) is not None
        )

    def holds_keys(self, part: str) -> bool:
        """Whether the keys of a part are taken. The keys of a part that will be replaced are free."""
        shard = self.shard_of.get(part)
        return shard is None or not self.needs_capture(shard)
