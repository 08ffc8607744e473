"""What a store says of itself: fingerprint, array specs, manifest; and the entries of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import StrictFloat, StrictInt

from cache.differences import NOTHING, Difference, leaf_differences
from cache.errors import SchemaError, UnsupportedFormat
from cache.format.documents import digest_of, validated
from cache.format.layout import FORMAT_VERSION, MANIFEST, check_array_name, check_part_name

Owner = Literal["sample", "image"]
Options = Mapping[str, StrictFloat | StrictInt | str]


@dataclass(frozen=True)
class Fingerprint:
    """What the cached values depend on: hex digests, or "" where one does not apply."""

    teacher: str
    tokenizer: str
    template: str
    image_preprocessing: str
    capture: str

    def differences(self, other: Fingerprint) -> list[Difference]:
        """Return the fields in which `other` (mine) differs from this one (the stored)."""
        stored, mine = asdict(self), asdict(other)
        return [Difference(name, stored[name], mine[name]) for name in stored if stored[name] != mine[name]]

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store as its user sees it; its codec decides how it is stored."""

    name: str
    axes: str  # legend letters, e.g. "R H N"; the first axis is ragged over samples or images
    row_shape: tuple[StrictInt, ...]  # the sizes of the other axes
    owner: Owner  # "image": one row for each distinct image of a part, samples point to it
    codec: str
    options: Options

    def __post_init__(self) -> None:
        check_array_name(self.name)
        where = f"arrays[{self.name}]"
        if self.owner not in get_args(Owner):
            raise SchemaError(f"{where}.owner", expected="'sample' or 'image'", found=self.owner)
        if any(size < 1 for size in self.row_shape):
            raise SchemaError(f"{where}.row_shape", expected="positive integers", found=self.row_shape)
        if len(self.axes.split()) != 1 + len(self.row_shape):
            expected = f"{1 + len(self.row_shape)} letters, for the rows and row_shape {self.row_shape}"
            raise SchemaError(f"{where}.axes", expected=expected, found=self.axes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Manifest:
    """What a store is and is meant to hold; written before its first part."""

    format_version: StrictInt
    fingerprint: Fingerprint
    arrays: tuple[ArraySpec, ...]
    teacher: dict[str, Any]  # facts that stage 2 needs, so that no config repeats them
    capture: dict[str, Any]  # the resolved capture settings
    provenance: dict[str, Any]  # versions, commit, command, time: may differ between runs
    planned_parts: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.arrays]
        if len(set(names)) != len(names):
            raise SchemaError("arrays", expected="each name once", found=names)
        for part in self.planned_parts:
            check_part_name(part)

    @property
    def specs(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self.arrays}

    def contents_digest(self) -> str:
        """Return the digest of fingerprint and arrays, which every part of the store must match."""
        arrays = [self.specs[name].to_json() for name in sorted(self.specs)]
        return digest_of({"fingerprint": self.fingerprint.to_json(), "arrays": arrays})

    def differences(self, other: Manifest) -> list[Difference]:
        """Return every field of fingerprint and arrays in which `other` (mine) differs from this (the stored)."""
        found: list[Difference] = []
        for difference in self.fingerprint.differences(other.fingerprint):
            # Of the capture settings, list those that differ instead of two digests.
            if difference.field == "capture" and self.capture != other.capture:
                found += leaf_differences("capture", self.capture, other.capture)
            else:
                found.append(difference)
        stored, mine = ({name: spec.to_json() for name, spec in side.specs.items()} for side in (self, other))
        for name in sorted(stored.keys() | mine.keys()):
            found += leaf_differences(f"arrays[{name}]", stored.get(name, NOTHING), mine.get(name, NOTHING))
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        check_format(record, MANIFEST)
        return validated(cls, record)


def check_format(record: Mapping[str, Any], file: str | Path) -> None:
    """Raise `UnsupportedFormat` unless the record is of the version that this code reads."""
    found = record.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:  # 1.0 and true equal 1
        raise UnsupportedFormat(file, found=found, readable=FORMAT_VERSION)


@dataclass(frozen=True)
class Span:
    """Where a member's bytes lie inside a tar."""

    file: str  # the member's name
    offset: int
    size: int


@dataclass(frozen=True)
class SampleEntry:
    """What a part's index says of one sample, beside the rows of its arrays."""

    key: str
    images: tuple[str, ...]  # blake3 hex digests of the image bytes, in the sample's order
    image_spans: tuple[Span, ...]
    json_span: Span

    def __post_init__(self) -> None:
        if len(self.images) != len(self.image_spans):
            expected = f"one span for each of the {len(self.images)} images"
            raise SchemaError(f"entry {self.key!r}.image_spans", expected=expected, found=self.image_spans)
