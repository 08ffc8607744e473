"""Stores made of stores: some parts, some arrays, or the parts of several; file by file, each hash compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cache.arrays import write_group
from cache.codecs import stored_arrays
from cache.documents import document_bytes
from cache.durable import hash_file, write_file
from cache.errors import CorruptPart, FingerprintMismatch, PartConflict, UnknownArray, UnknownPart
from cache.layout import INDEX, REJECTS, parent_groups, part_path
from cache.part_reader import FinishedPart
from cache.part_writer import describe_files, publish_part, seal_part
from cache.place import Place, copy_files, place
from cache.reader import Store
from cache.records import PartRecord, read_part_record
from cache.schema import Manifest
from cache.scratch import new_scratch, remove
from cache.writer import StoreWriter


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
        if not writer.is_done(name):
            _copy(FinishedPart(source.path, name, manifest=source.manifest), writer)
        each(name)
    return Store(target)


def merge_stores(sources: Sequence[Store], target: str | Path) -> Store:
    """All parts of stores of one fingerprint in a new store.

    Raises `FingerprintMismatch` if they hold different things, `PartConflict` if two have a part that differs.
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


def _copy(part: FinishedPart, writer: StoreWriter) -> None:
    """One part with the arrays of the writer's store: under a temporary name, then by one rename."""
    folder = new_scratch(writer.path, part.path.name)
    arrays = [(spec, stored) for spec in writer.manifest.arrays for stored in stored_arrays(spec)]
    try:
        for group in parent_groups([stored.name(spec) for spec, stored in arrays]):
            write_group(folder / group)
        prefixes = tuple(f"{stored.name(spec)}/" for spec, stored in arrays)
        kept = [name for name in part.record.files if name.startswith(prefixes) or name == REJECTS]
        _copy_files(part, kept, folder)
        rows = {
            name: offsets for name, offsets in part.index.row_offsets.items() if name in writer.manifest.specs
        }
        write_file(folder / INDEX, document_bytes(replace(part.index, row_offsets=rows).to_json()))
        contents = writer.manifest.contents_digest()
        record = replace(part.record, contents=contents, files=describe_files(folder))
        seal_part(folder, record)
        publish_part(folder, part_path(writer.path, part.path.name), record, store=writer.path)
    finally:
        remove(folder)


def _copy_files(part: FinishedPart, names: Sequence[str], folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_files({part.path / name: folder / name for name in names})
    except FileNotFoundError as error:
        raise CorruptPart(place(error.filename or part.path), "the file is gone") from error
    for name in names:
        if hash_file(folder / name) != part.record.files[name].blake3:
            raise CorruptPart(part.path / name, "its blake3 is not the one in part.json")
