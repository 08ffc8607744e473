"""Looks at a store for damage and names every file it finds; a damaged store never makes it raise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache.care.verify_part import PartAudit, Problem, audit_part, kind_of_extra
from cache.errors import CacheError, CorruptFile, StoreNotFound, UnreadableFile
from cache.files.place import Place, place, sizes_below
from cache.format.codecs import check_specs
from cache.format.documents import canonical_json, read_document
from cache.format.layout import (
    CARD,
    GROUP_METADATA,
    INDEX,
    LEASES,
    LOCK,
    MANIFEST,
    PARTS,
    SCRATCH,
    ZARR_METADATA,
)
from cache.format.schema import Manifest
from cache.write.leases import lease_holder
from cache.write.scratch import scratch_owner

_NO_DAMAGE = ("missing part", "unexpected file", "stray file", "foreign part", "unreadable")


@dataclass(frozen=True)
class Report:
    """What `verify` looked at, and every problem that it found."""

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
        """Parts with damaged files, or without a done-mark, which can be captured again from their shards.

        Files that do not belong to a part, and files that the system refuses to read, are no damage of it.
        """
        parts = [problem.part for problem in self.problems if problem.kind not in _NO_DAMAGE]
        return tuple(sorted({part for part in parts if part}))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(path: str | Path, *, deep: bool) -> Report:
    """Look at names, sizes, counts and the checksums of metadata; `deep` also hashes and decodes every array.

    StoreNotFound if there is neither a manifest nor a directory of parts; all else is a Problem.
    """
    store = place(path)
    if not (store / MANIFEST).exists() and not (store / PARTS).is_dir():
        raise StoreNotFound(store, "neither one nor a directory of parts" if store.is_dir() else "nothing")
    manifest, problems = _manifest(store)
    problems += [*_folder_problems(store), *_plan_problems(store, manifest)]
    names = [entry.name for entry in _entries(store / PARTS) if entry.is_dir()]
    if manifest:  # other folders are named above, and are no parts
        names = [name for name in names if name in manifest.planned_parts]
    audits = [audit_part(store, name, manifest=manifest, deep=deep) for name in names]
    problems += [problem for audit in audits for problem in audit.problems]
    problems += _shared_keys(audits)
    return _report(store, audits, problems=problems, deep=deep)


def _report(store: Place, audits: list[PartAudit], *, problems: list[Problem], deep: bool) -> Report:
    records = [audit.record for audit in audits if audit.record]
    sizes = sizes_below(store, leave_out_unreadable=True)
    return Report(
        path=str(store),
        deep=deep,
        problems=tuple(problems),
        parts=len(records),
        samples=sum(record.counts.cached for record in records),
        files=len(sizes),
        bytes=sum(sizes.values()),
    )


def _manifest(store: Place) -> tuple[Manifest | None, list[Problem]]:
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


def _folder_problems(store: Place) -> Iterator[Problem]:
    """What lies beside the parts: two group files, the manifest, and nothing in tmp/."""
    for name in (ZARR_METADATA, f"{PARTS}/{ZARR_METADATA}"):
        if not (store / name).is_file():
            yield Problem("missing file", name, "the metadata of a Zarr group is gone")
        elif not _is_group_metadata(store / name):
            yield Problem("metadata", name, "it is not the metadata of a Zarr group as this format writes it")
    for entry in _entries(store):
        if entry.name not in {MANIFEST, CARD, ZARR_METADATA, PARTS, SCRATCH, LEASES, LOCK}:
            yield Problem(kind_of_extra(entry.name), entry.name, "the format has no such file")
    for entry in _entries(store / PARTS):
        if not entry.is_dir() and entry.name != ZARR_METADATA:
            kind = kind_of_extra(entry.name)
            yield Problem(kind, f"{PARTS}/{entry.name}", "parts/ holds directories only")
    for entry in _entries(store / SCRATCH):
        yield Problem("unfinished part", f"{SCRATCH}/{entry.name}", _origin(entry.name))
    for entry in _entries(store / LEASES):
        yield Problem("unfinished part", f"{LEASES}/{entry.name}", _origin(_holder(entry)))


def _is_group_metadata(file: Place) -> bool:
    try:
        return file.read_bytes() == canonical_json(GROUP_METADATA)
    except OSError:
        return False


def _plan_problems(store: Place, manifest: Manifest | None) -> Iterator[Problem]:
    if manifest is None:
        return
    present = {entry.name for entry in _entries(store / PARTS) if entry.is_dir()}
    for name in sorted(set(manifest.planned_parts) - present):
        yield Problem("missing part", f"{PARTS}/{name}", "planned, but not written")
    for name in sorted(present - set(manifest.planned_parts)):
        yield Problem(kind_of_extra(name), f"{PARTS}/{name}", "the manifest does not plan this part")


def _shared_keys(audits: list[PartAudit]) -> Iterator[Problem]:
    part_of: dict[str, str] = {}
    for audit in audits:
        for key in audit.index.keys if audit.index else ():
            other = part_of.setdefault(key, audit.name)
            if other != audit.name:
                yield Problem("metadata", f"{PARTS}/{audit.name}/{INDEX}", f"key {key!r} is also in {other}")


def _holder(lease: Place) -> str:
    return lease_holder(lease) if isinstance(lease, Path) else ""


def _origin(name: str) -> str:
    owner = scratch_owner(name)
    if owner is None:
        return "not of a name that a writer gives"
    state = "which no longer runs" if owner.is_dead else "which may still be at work"
    return f"left by process {owner.process} on host {owner.host}, {state}"


def _entries(directory: Place) -> list[Place]:
    return sorted(directory.iterdir(), key=str) if directory.is_dir() else []
