"""Members of shards read by their places: of local files, and by ranges from servers, a batch's in one round."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

from blake3 import blake3

from cache import Mirror, Range, RemotePath, Span, find_ranges, without_secrets
from pipeline.config.config import DataConfig
from pipeline.data.reading import opened, reading
from pipeline.data.remote_shards import about, sends_ranges
from pipeline.data.shard_files import checked
from pipeline.data.shard_kinds import is_packed, is_pipe, is_remote
from pipeline.errors import ShardError

# Bytes between two members that are read with them rather than asked for apart: a JSON lies beside its image.
_GAP_BYTES = 4096
Place = tuple[str, Span]  # a shard, and a member of it
ReadSpan = Callable[[str, Span], bytes]
REMEDY = (
    "put an uncompressed copy of the same name where ranges can be read (a folder, s3://, gs://, hf://, or a web "
    "server with ranges), and name it in data.shards instead"
)


def read_span(path: str | Path, span: Span) -> bytes:
    """Return a member's bytes by their place in the tar; raises `ShardError` if the shard is shorter."""
    shard = str(path)
    if is_remote(shard):
        return SpanReader()(shard, span)
    with reading(shard), opened(shard) as file:
        file.seek(span.offset)
        data = file.read(span.size)
    return checked(shard, span, data)


@dataclass(frozen=True)
class SpanReader:
    """Reads members of shards. What comes from a server is kept in the mirror, if there is one. Picklable."""

    mirror: Mirror | None = None
    held: Mapping[Place, bytes] = field(default_factory=dict[Place, bytes])

    @classmethod
    def of(cls, data: DataConfig) -> SpanReader:
        """Return a reader with the mirror that a config names."""
        folder = data.mirror
        return cls(Mirror(Path(folder).expanduser(), data.mirror_bytes) if folder else None)

    def __call__(self, shard: str, span: Span) -> bytes:
        """Return a member's bytes; raises `ShardError` if the shard is shorter or cannot be read."""
        if (data := self.held.get((shard, span))) is not None:
            return data
        return self.holding([(shard, span)]).held[shard, span] if is_remote(shard) else read_span(shard, span)

    def holding(self, places: Iterable[Place]) -> SpanReader:
        """Return a reader that holds those of the members that lie behind URLs, all fetched at once."""
        remote = sorted({place for place in places if is_remote(place[0])}, key=_order)
        held: dict[Place, bytes] = {}
        for _, group in groupby(remote, key=lambda place: _server(place[0])):
            held |= self._fetched(list(group))
        return replace(self, held=held)

    def _fetched(self, places: Sequence[Place]) -> dict[Place, bytes]:
        """Return members of one server's shards."""
        paths = {shard: RemotePath(shard, self._mirror_of(shard)) for shard, _ in places}
        ranges = [Range(paths[shard], span.offset, span.offset + span.size) for shard, span in places]
        with reading(places[0][0]):
            found = find_ranges(ranges, gap=_GAP_BYTES)
        return {place: checked(*place, data or b"") for place, data in zip(places, found, strict=True)}

    def _mirror_of(self, shard: str) -> Mirror | None:
        """Return the mirror for a shard: of another version of it nothing is taken, and without one nothing kept."""
        if self.mirror is None or not (file := about(shard)).version:
            return None
        return replace(self.mirror, version=blake3(f"{file.size} {file.version}".encode()).hexdigest())


def _order(place: Place) -> tuple[str, str, int]:
    return _server(place[0]), place[0], place[1].offset


def _server(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def without_ranges(shards: Iterable[str]) -> dict[str, str]:
    """Return why members cannot be read by their places, for each shard of which they cannot."""
    reasons: dict[str, str] = {}
    for shard in shards:
        if is_pipe(shard):
            reasons[shard] = "a command gives its bytes only from front to back"
        elif is_packed(shard):
            reasons[shard] = "it is compressed"
        elif is_remote(shard) and not sends_ranges(shard):
            reasons[shard] = "its server sends whole files only"
    return reasons


def warn_of_streams(shards: Sequence[str]) -> None:
    """Say on stderr which shards stage 1 can read, but stage 2 cannot, and what to do."""
    if reasons := without_ranges(shards):
        first, why = next(iter(reasons.items()))
        print(
            f"alignkd: {len(reasons)} of {len(shards)} shards can be captured, but stage 2 will not be able to read "
            f"samples of them, first {without_secrets(first)} ({why}); before training {REMEDY}.",
            file=sys.stderr,
        )


def check_ranges(shards: Sequence[str]) -> None:
    """Raise `ShardError` if samples of a shard cannot be read by their places."""
    if reasons := without_ranges(shards):
        first, why = next(iter(reasons.items()))
        raise ShardError(
            f"{len(reasons)} of {len(shards)} shards cannot be read in any order, first {first} ({why}); "
            f"{REMEDY}."
        )
