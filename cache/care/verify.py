"""Checks a whole store and names every damaged file; a damaged store never makes it raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.care.reading import Reading
from cache.care.verify_part import PartAudit, Problem, audit_part, kind_of_extra
from cache.errors import CacheError, CorruptFile, StoreNotFound, UnreadableFile
from cache.files.any_path import AnyPath, any_path, sizes_below
from cache.format import layout
from cache.format.codecs import check_specs
from cache.format.documents import canonical_json, read_document
from cache.format.layout import INDEX, LEASES, MANIFEST, PARTS, SCRATCH, ZARR_METADATA
from cache.format.schema import Manifest
from cache.write.leases import lease_holder
from cache.write.scratch import scratch_owner

_NO_DAMAGE = ("missing part", "unexpected file", "stray file", "foreign part", "unreadable")
_KNOWN = {MANIFEST, layout.CARD, ZARR_METADATA, PARTS, SCRATCH, LEASES, layout.LOCK}


@dataclass(frozen=True)
class Report:
    """What `verify` checked, and every problem that it found."""

    path: str
    deep: bool
    problems: tuple[Problem, ...]
    parts: int  # whose part.json could be read
    samples: int  # cached ones, of these parts
    files: int
    bytes: int

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong; stray files, which systems leave in folders, are listed but do no harm."""
        return not self.num_problems

    @property
    def num_problems(self) -> int:
        """How many problems there are, without stray files."""
        return sum(problem.kind != "stray file" for problem in self.problems)

    @property
    def damaged_parts(self) -> tuple[str, ...]:
        """Parts with damaged files or without a done-mark, which can be captured again from their shards.

        Files that do not belong to a part, and files that the system refuses to read, are no damage of it.
        """
        parts = {problem.part for problem in self.problems if problem.kind not in _NO_DAMAGE}
        return tuple(sorted(parts - {""}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    path: str | Path, *, deep: bool, progress: Callable[[int, int], object] = lambda done, total: None
) -> Report:
    """Check names, sizes, counts and the hashes of metadata; `deep` also hashes every file and decodes every array.

    If deep, `progress` gets the bytes of the parts that are read and those to read; what is decoded is read twice.

    Raises `StoreNotFound` if there is neither a manifest nor a directory of parts; all else is a Problem.
    """
    store = any_path(path)
    if not (store / MANIFEST).exists() and not (store / PARTS).is_dir():
        raise StoreNotFound(store, "neither one nor a directory of parts" if store.is_dir() else "nothing")
    manifest, problems = _manifest(store)
    names = [entry.name for entry in _entries(store / PARTS) if entry.is_dir()]
    problems += _folder_problems(store)
    if manifest:
        problems += _plan_problems(names, manifest)
        names = [name for name in names if name in manifest.planned_parts]  # others are problems already
    sizes = sizes_below(store, leave_out_unreadable=True)
    reading = Reading(sizes, names, progress) if deep else None
    audits = [audit_part(store, name, manifest=manifest, reading=reading) for name in names]
    if reading:
        reading.end()
    problems += [problem for audit in audits for problem in audit.problems]
    problems += _shared_keys(audits)
    records = [audit.record for audit in audits if audit.record]
    return Report(
        path=str(store),
        deep=deep,
        problems=tuple(problems),
        parts=len(records),
        samples=sum(record.counts.cached for record in records),
        files=len(sizes),
        bytes=sum(sizes.values()),
    )


def _manifest(store: AnyPath) -> tuple[Manifest | None, list[Problem]]:
    file = store / MANIFEST
    if not file.exists():
        return None, [Problem("missing file", MANIFEST, "the store's manifest is gone")]
    try:
        manifest = Manifest.from_json(read_document(file))
        check_specs(manifest.arrays)
    except CorruptFile as error:
        return None, [Problem("checksum", MANIFEST, error.detail)]
    except UnreadableFile as error:
        return None, [Problem("unreadable", MANIFEST, error.reason)]
    except CacheError as error:
        return None, [Problem("metadata", MANIFEST, str(error))]
    return manifest, []


def _folder_problems(store: AnyPath) -> Iterator[Problem]:
    """Yield what is wrong outside the parts: files that are missing, unknown, or left by a writer."""
    for name in (ZARR_METADATA, f"{PARTS}/{ZARR_METADATA}"):
        try:
            is_right = (store / name).read_bytes() == canonical_json(layout.GROUP_METADATA)
        except OSError:
            is_right = False
        if not (store / name).is_file():
            yield Problem("missing file", name, "the metadata of a Zarr group is gone")
        elif not is_right:
            yield Problem("metadata", name, "it is not the metadata of a Zarr group as this format writes it")
    for entry in _entries(store):
        if entry.name not in _KNOWN:
            yield Problem(kind_of_extra(entry.name), entry.name, "the format has no such file")
    for entry in _entries(store / PARTS):
        if not entry.is_dir() and entry.name != ZARR_METADATA:
            kind = kind_of_extra(entry.name)
            yield Problem(kind, f"{PARTS}/{entry.name}", "parts/ holds directories only")
    for entry in _entries(store / SCRATCH):
        yield Problem("unfinished part", f"{SCRATCH}/{entry.name}", _origin(entry.name))
    for entry in _entries(store / LEASES):
        holder = lease_holder(entry) if isinstance(entry, Path) else ""
        yield Problem("unfinished part", f"{LEASES}/{entry.name}", _origin(holder))


def _plan_problems(present: list[str], manifest: Manifest) -> Iterator[Problem]:
    for name in sorted(set(manifest.planned_parts) - set(present)):
        yield Problem("missing part", f"{PARTS}/{name}", "planned, but not written")
    for name in sorted(set(present) - set(manifest.planned_parts)):
        yield Problem(kind_of_extra(name), f"{PARTS}/{name}", "the manifest does not plan this part")


def _shared_keys(audits: list[PartAudit]) -> Iterator[Problem]:
    part_of: dict[str, str] = {}
    for audit in audits:
        for key in audit.index.keys if audit.index else ():
            other = part_of.setdefault(key, audit.name)
            if other != audit.name:
                yield Problem("metadata", f"{PARTS}/{audit.name}/{INDEX}", f"key {key!r} is also in {other}")


def _origin(name: str) -> str:
    """Say which process left an entry of tmp/ or a lease, by its name."""
    if (owner := scratch_owner(name)) is None:
        return "not of a name that a writer gives"
    state = "which no longer runs" if owner.is_dead else "which may still be running"
    return f"left by process {owner.process} on host {owner.host}, {state}"


def _entries(directory: AnyPath) -> list[AnyPath]:
    return sorted(directory.iterdir(), key=str) if directory.is_dir() else []
