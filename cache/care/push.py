"""Puts a store behind a URL, part by part: a part's done-mark after its files, the manifest after its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache.errors import CorruptPart, FingerprintMismatch, NotThere, PartConflict
from cache.files.durable import hash_file
from cache.files.place import Place, Range, RemotePath, find_ranges, local, place
from cache.files.remote import upload
from cache.format.documents import canonical_json, document_bytes, read_document
from cache.format.layout import CARD, GROUP_METADATA, MANIFEST, PART_RECORD, PARTS, ZARR_METADATA, part_path
from cache.format.records import read_part_record
from cache.format.schema import Manifest
from cache.read.reader import Store


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    sent: tuple[str, ...]  # parts
    found: tuple[str, ...]  # parts that were there already, byte for byte
    bytes: int  # of the parts that were sent


def push_store(
    source: Store, url: str, *, card: bytes, each: Callable[[str], object] = lambda part: None
) -> Pushed:
    """Send the finished parts of a store to a URL; a push that was stopped goes on with the first part it lacks.

    Every file's hash is compared before it is sent. Raises `FingerprintMismatch` if another store is there,
    `PartConflict` if a part is there with other content, `CorruptPart` before a damaged part is sent.
    """
    folder = local(source.path, doing="pushed from")
    target = place(url)
    if isinstance(target, Path):
        asked = "push needs a URL, such as s3://bucket/teacher.zarr; to copy to a folder, `alignkd slice`"
        raise NotThere(target, asked=asked)
    manifest = _united(target, source)
    todo = _parts_to_send(folder, target, source.parts)
    num_bytes = 0
    for name in source.parts:
        if name in todo:
            num_bytes += _send_part(part_path(folder, name), part_path(target, name))
        each(name)
    groups: dict[str, Path | bytes] = {
        f"{target / name}": canonical_json(GROUP_METADATA)
        for name in (ZARR_METADATA, f"{PARTS}/{ZARR_METADATA}")
    }
    upload(
        {**groups, f"{target / CARD}": card},
        last={f"{target / MANIFEST}": document_bytes(manifest.to_json())},
    )
    return Pushed(target.url, tuple(todo), tuple(sorted(set(source.parts) - set(todo))), num_bytes)


def card_at(url: str) -> str:
    """The card of the store that was pushed to a URL; "" if there is none."""
    data = find_ranges([Range(place(url) / CARD)])[0]
    return "" if data is None else data.decode(errors="replace")


def _united(target: RemotePath, source: Store) -> Manifest:
    """The source's manifest, which plans what is there already, and what the source has finished."""
    data = find_ranges([Range(target / MANIFEST)])[0]
    there = None if data is None else Manifest.from_json(read_document(target / MANIFEST, data))
    if there and (differences := there.differences(source.manifest)):
        raise FingerprintMismatch(target, differences, remedy="Push to another URL.")
    planned = {*source.parts, *(there.planned_parts if there else ())}
    return replace(source.manifest, planned_parts=tuple(sorted(planned)))


def _parts_to_send(folder: Path, target: Place, parts: Sequence[str]) -> list[str]:
    marks = find_ranges([Range(part_path(target, name) / PART_RECORD) for name in parts])
    for name, there in zip(parts, marks, strict=True):
        if there not in (None, (part_path(folder, name) / PART_RECORD).read_bytes()):
            raise PartConflict(name, stores=(folder, target))
    return [name for name, there in zip(parts, marks, strict=True) if there is None]


def _send_part(part: Path, target: Place) -> int:
    record = read_part_record(part)
    for name, recorded in record.files.items():
        if not (part / name).is_file() or hash_file(part / name) != recorded.blake3:
            raise CorruptPart(part / name, "its blake3 is not the one in part.json")
    files: dict[str, Path | bytes] = {f"{target / name}": part / name for name in record.files}
    upload(files, last={f"{target / PART_RECORD}": part / PART_RECORD})
    return sum(file.bytes for file in record.files.values())
