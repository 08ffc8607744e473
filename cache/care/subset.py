"""Stores made of other stores: some parts, some arrays, or the parts of several; each file's hash is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cache.errors import (
    CorruptPart,
    FingerprintMismatch,
    FormatMismatch,
    PartConflict,
    UnknownArray,
    UnknownPart,
)
from cache.files.any_path import AnyPath, any_path, copy_files
from cache.files.durable import hash_file, sync_file
from cache.format.codecs import stored_arrays
from cache.format.documents import document_bytes
from cache.format.layout import INDEX, REJECTS, part_path
from cache.format.records import PartRecord, read_part_record
from cache.format.schema import Manifest
from cache.read.keys import KeyTable
from cache.read.part_reader import FinishedPart
from cache.read.reader import Store
from cache.write.part_folder import PartFolder
from cache.write.writer import StoreWriter


def slice_store(
    source: Store,
    target: str | Path,
    *,
    manifest: Manifest,
    parts: Sequence[str] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Store:
    """Copy parts of a store, with the arrays that `manifest` lists, into a new store; an interrupted copy resumes.

    The source may be behind a URL: nothing else is fetched. `progress` gets the parts that are copied and those to
    copy, at the beginning and after every part.
    Raises `UnknownArray` or `UnknownPart` for what the source has not, `CorruptPart` for what is damaged there.
    """
    specs = source.manifest.specs
    for spec in manifest.arrays:
        if specs.get(spec.name) != spec:
            raise UnknownArray(spec.name, known=specs, path=source.path)
    names = source.parts if parts is None else tuple(parts)
    if unknown := sorted(set(names) - set(source.parts)):
        raise UnknownPart(unknown[0], path=source.path, num_parts=len(source.parts))
    writer = StoreWriter.open(target, replace(manifest, planned_parts=names))
    todo = [(name, is_damaged) for name in names if (is_damaged := _is_damaged(writer, name)) is not None]
    progress(0, len(todo))
    for number, (name, is_damaged) in enumerate(todo, start=1):
        part = FinishedPart(source.path, name, manifest=source.manifest)
        _copy(part, writer, replace_damaged=is_damaged)
        progress(number, len(todo))
    return Store(target)


def _is_damaged(writer: StoreWriter, name: str) -> bool | None:
    """Whether a part must replace a damaged one; None if it is there, and sound."""
    try:
        return None if writer.is_done(name) else False
    except CorruptPart:
        return True


def merge_stores(sources: Sequence[Store], target: str | Path) -> Store:
    """Copy all parts of stores of one fingerprint into a new store.

    Raises `FormatMismatch` if they are of different formats, `FingerprintMismatch` if they hold different things,
    `PartConflict` if two have a part that differs, `DuplicateKey` if two parts hold one key; nothing is written then.
    """
    first = sources[0]
    for other in sources[1:]:
        found, asked = other.manifest.format_version, first.manifest.format_version
        if found != asked:
            raise FormatMismatch(other.path, found=found, asked=asked, remedy="merge stores of one format")
        if differences := first.manifest.differences(other.manifest):
            remedy = f"Merge stores made as {first.path} was."
            raise FingerprintMismatch(other.path, differences, remedy=remedy)
    _check_shared(sources)
    names = tuple(sorted({name for source in sources for name in source.parts}))
    StoreWriter.open(target, replace(first.manifest, planned_parts=names))
    for source in sources:
        slice_store(source, target, manifest=first.manifest)
    return Store(target)


def _check_shared(sources: Sequence[Store]) -> None:
    seen: dict[str, tuple[AnyPath, PartRecord]] = {}
    for source in sources:
        for name in source.parts:
            record = read_part_record(part_path(source.path, name))
            path, known = seen.setdefault(name, (source.path, record))
            if known.files != record.files:
                raise PartConflict(name, stores=(path, source.path))
    holders = {name: source for source in sources for name in source.parts}
    KeyTable((name, holder.keys_of(name)) for name, holder in holders.items()).check_duplicates()


def _copy(part: FinishedPart, writer: StoreWriter, *, replace_damaged: bool) -> None:
    """Copy one part with the arrays of the writer's store, under a temporary name, and publish it by one rename."""
    folder = PartFolder(writer.path, part.path.name)
    manifest = writer.manifest
    arrays = [stored.name(spec) for spec in manifest.arrays for stored in stored_arrays(spec)]
    kept = tuple(f"{name}/" for name in arrays)
    try:
        folder.write_groups(arrays)
        _copy_files(part, [n for n in part.record.files if n.startswith(kept) or n == REJECTS], folder)
        rows = {name: rows for name, rows in part.index.rows.items() if name in manifest.specs}
        folder.write(INDEX, document_bytes(replace(part.index, rows=rows).to_json()))
        record = replace(part.record, contents=manifest.contents_digest(), files=folder.files)
        folder.publish(record, replace=replace_damaged)
    finally:
        folder.remove()


def _copy_files(part: FinishedPart, names: Sequence[str], folder: PartFolder) -> None:
    for name in names:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_files({part.path / name: folder.path / name for name in names})
    except FileNotFoundError as error:
        raise CorruptPart(any_path(error.filename or part.path), "the file is gone") from error
    for name in names:
        folder.files[name] = part.record.files[name]
        if hash_file(folder.path / name) != part.record.files[name].blake3:
            raise CorruptPart(part.path / name, "its blake3 is not the one in part.json")
        sync_file(folder.path / name)
