"""Stores made of stores: some parts, some arrays, or the parts of several; file by file, each hash compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cache.errors import (
    CorruptPart,
    FingerprintMismatch,
    PartConflict,
    UnknownArray,
    UnknownPart,
)
from cache.files.durable import hash_file, sync_file
from cache.files.place import Place, copy_files, place
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
    each: Callable[[str], object] = lambda part: None,
) -> Store:
    """Copy parts of a store, with the arrays that `manifest` lists, into a new store; go on where a copy stopped.

    The source may be behind a URL: nothing else is fetched. `each` is called with every part that is there.

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
    for name in names:
        if (state := _state(writer, name)) != "done":
            part = FinishedPart(source.path, name, manifest=source.manifest)
            _copy(part, writer, replace_damaged=state == "damaged")
        each(name)
    return Store(target)


def _state(writer: StoreWriter, name: str) -> Literal["done", "absent", "damaged"]:
    try:
        return "done" if writer.is_done(name) else "absent"
    except CorruptPart:
        return "damaged"


def merge_stores(sources: Sequence[Store], target: str | Path) -> Store:
    """All parts of stores of one fingerprint in a new store.

    Raises `FingerprintMismatch` if they hold different things, `PartConflict` if two have a part that differs,
    `DuplicateKey` if two parts hold one key; nothing is written then.
    """
    first = sources[0]
    for other in sources[1:]:
        if differences := first.manifest.differences(other.manifest):
            raise FingerprintMismatch(
                other.path, differences, remedy=f"Merge stores made as {first.path} was."
            )
    _check_shared(sources)
    names = tuple(sorted({name for source in sources for name in source.parts}))
    StoreWriter.open(target, replace(first.manifest, planned_parts=names))
    for source in sources:
        slice_store(source, target, manifest=first.manifest)
    return Store(target)


def _check_shared(sources: Sequence[Store]) -> None:
    seen: dict[str, tuple[Place, PartRecord]] = {}
    for source in sources:
        for name in source.parts:
            record = read_part_record(part_path(source.path, name))
            path, known = seen.setdefault(name, (source.path, record))
            if known.files != record.files:
                raise PartConflict(name, stores=(path, source.path))
    holders = {name: source for source in sources for name in source.parts}
    # The table raises if two parts share a key.
    KeyTable((name, holder.keys_of(name)) for name, holder in holders.items())


def _copy(part: FinishedPart, writer: StoreWriter, *, replace_damaged: bool) -> None:
    """One part with the arrays of the writer's store: under a temporary name, then by one rename."""
    folder = PartFolder(writer.path, part.path.name)
    arrays = [(spec, stored) for spec in writer.manifest.arrays for stored in stored_arrays(spec)]
    try:
        folder.write_groups([stored.name(spec) for spec, stored in arrays])
        prefixes = tuple(f"{stored.name(spec)}/" for spec, stored in arrays)
        _copy_files(part, [n for n in part.record.files if n.startswith(prefixes) or n == REJECTS], folder)
        rows = {
            name: offsets for name, offsets in part.index.row_offsets.items() if name in writer.manifest.specs
        }
        folder.write(INDEX, document_bytes(replace(part.index, row_offsets=rows).to_json()))
        contents = writer.manifest.contents_digest()
        record = replace(part.record, contents=contents, files=folder.files)
        folder.publish(record, replace=replace_damaged)
    finally:
        folder.remove()


def _copy_files(part: FinishedPart, names: Sequence[str], folder: PartFolder) -> None:
    for name in names:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_files({part.path / name: folder.path / name for name in names})
    except FileNotFoundError as error:
        raise CorruptPart(place(error.filename or part.path), "the file is gone") from error
    for name in names:
        folder.files[name] = part.record.files[name]
        if hash_file(folder.path / name) != part.record.files[name].blake3:
            raise CorruptPart(part.path / name, "its blake3 is not the one in part.json")
        sync_file(folder.path / name)
