"""Copies a store to a URL, part by part: a part's done-mark after its files, the manifest after its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cache.errors import CorruptPart, FingerprintMismatch, FormatMismatch, NotThere, PartConflict
from cache.files.any_path import AnyPath, Range, RemotePath, any_path, find_ranges, local, read_file
from cache.files.durable import hash_file
from cache.files.remote import upload
from cache.format.documents import canonical_json, document_bytes, read_document
from cache.format.layout import CARD, GROUP_METADATA, MANIFEST, PART_RECORD, PARTS, ZARR_METADATA, part_path
from cache.format.records import PartRecord, read_part_record
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
    source: Store,
    url: str,
    *,
    card: bytes,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Pushed:
    """Send the finished parts of a store to a URL; an interrupted push resumes.

    `progress` gets the bytes that are sent and those to send, at the beginning and after every part.

    Every file's hash is compared before it is sent. Raises `FingerprintMismatch` or `FormatMismatch` if another store
    is there, `PartConflict` if a part is there with other content, `CorruptPart` before a damaged part is sent.
    """
    folder = local(source.path, doing="pushed from")
    target = any_path(url)
    if isinstance(target, Path):
        asked = "push needs a URL, such as s3://bucket/teacher.zarr; to copy to a folder, `alignkd slice`"
        raise NotThere(target, asked=asked)
    manifest = _united(target, source)
    sent = _parts_to_send(folder, target, source)
    records = {name: read_part_record(part_path(folder, name)) for name in sent}
    num_bytes, to_send = 0, sum(map(_bytes_of, records.values()))
    progress(0, to_send)
    for name, record in records.items():
        _send_part(part_path(folder, name), part_path(target, name), record)
        num_bytes += _bytes_of(record)
        progress(num_bytes, to_send)
    group = canonical_json(GROUP_METADATA)
    files: dict[str, Path | bytes] = {
        f"{target / name}": group for name in (ZARR_METADATA, f"{PARTS}/{ZARR_METADATA}")
    }
    data = document_bytes(manifest.to_json())
    upload({**files, f"{target / CARD}": card}, last={f"{target / MANIFEST}": data})
    found = tuple(name for name in source.parts if name not in sent)
    return Pushed(target.url, tuple(sent), found, num_bytes)


def card_at(url: str) -> str:
    """Return the card of the store at a URL; "" if there is none."""
    return (read_file(any_path(url) / CARD) or b"").decode(errors="replace")


def _united(target: RemotePath, source: Store) -> Manifest:
    """Return the source's manifest, planning the parts that it has finished and those planned at the target."""
    planned = set(source.parts)
    if (data := read_file(target / MANIFEST)) is not None:
        there = Manifest.from_json(read_document(target / MANIFEST, data))
        found, mine = there.format_version, source.manifest.format_version
        if found != mine:
            raise FormatMismatch(target, found=found, asked=mine, remedy="push to another URL")
        if differences := there.differences(source.manifest):
            raise FingerprintMismatch(target, differences, remedy="Push to another URL.")
        planned |= set(there.planned_parts)
    return replace(source.manifest, planned_parts=tuple(sorted(planned)))


def _parts_to_send(folder: Path, target: RemotePath, source: Store) -> list[str]:
    marks = find_ranges([Range(part_path(target, name) / PART_RECORD) for name in source.parts])
    there = {name: mark for name, mark in zip(source.parts, marks, strict=True) if mark is not None}
    for name, mark in there.items():
        if mark != (part_path(folder, name) / PART_RECORD).read_bytes():
            raise PartConflict(name, stores=(folder, target))
    return [name for name in source.parts if name not in there]


def _bytes_of(record: PartRecord) -> int:
    return sum(file.bytes for file in record.files.values())


def _send_part(part: Path, target: AnyPath, record: PartRecord) -> None:
    for name, recorded in record.files.items():
        if not (part / name).is_file() or hash_file(part / name) != recorded.blake3:
            raise CorruptPart(part / name, "its blake3 is not the one in part.json")
    files: dict[str, Path | bytes] = {f"{target / name}": part / name for name in record.files}
    upload(files, last={f"{target / PART_RECORD}": part / PART_RECORD})
