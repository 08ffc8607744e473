"""What a store says of itself: fingerprint, array specs, manifest, sample entries; to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from cache.differences import NOTHING, Difference, leaf_differences
from cache.errors import SchemaError, UnsupportedFormat
from cache.format.documents import digest_of
from cache.format.layout import FORMAT_VERSION, MANIFEST, check_array_name, check_part_name

Owner = Literal["sample", "image"]
Options = Mapping[str, float | int | str]

_KINDS: dict[type, str] = {
    float: "a number",
    str: "a string",
    int: "an integer",
    dict: "an object",
    list: "a list",
}


def take(record: Mapping[str, Any], name: str, kind: type, *, where: str = "") -> Any:
    """`record[name]`, which must be there and of the JSON kind asked for."""
    field = f"{where}.{name}" if where else name
    if name not in record:
        raise SchemaError(field, expected=_KINDS[kind], found=NOTHING)
    return expect(record[name], kind, field=field)


def expect(value: Any, kind: type, *, field: str) -> Any:
    """`value`, which must be of the JSON kind asked for (true and false are no integers)."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SchemaError(field, expected=_KINDS[kind], found=value)
    return value


def take_all(record: Mapping[str, Any], name: str, kind: type, *, where: str = "") -> list[Any]:
    """The list `record[name]`, each of whose elements must be of the JSON kind asked for."""
    values = take(record, name, list, where=where)
    field = f"{where}.{name}" if where else name
    return [expect(value, kind, field=f"{field}[{i}]") for i, value in enumerate(values)]


@dataclass(frozen=True)
class Fingerprint:
    """What the cached values depend on: hex digests, or "" where one does not apply."""

    teacher: str
    tokenizer: str
    template: str
    image_preprocessing: str
    capture: str

    def differences(self, other: Fingerprint) -> list[Difference]:
        """The fields in which `other` (mine) differs from this one (the stored)."""
        mine = asdict(other)
        return [
            Difference(name, value, mine[name]) for name, value in asdict(self).items() if value != mine[name]
        ]

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Fingerprint:
        return cls(
            **{field.name: take(record, field.name, str, where="fingerprint") for field in fields(cls)}
        )


@dataclass(frozen=True)
class ArraySpec:
    """One array that a store keeps, as its user sees it: the codec decides how it lies on the disk."""

    name: str
    axes: str  # legend letters, e.g. "R H N"; the first axis is ragged over samples or images
    row_shape: tuple[int, ...]  # the sizes of the other axes
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
        return {**asdict(self), "row_shape": list(self.row_shape), "options": dict(self.options)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ArraySpec:
        name = take(record, "name", str, where="arrays")
        where = f"arrays[{name}]"
        return cls(
            name=name,
            axes=take(record, "axes", str, where=where),
            row_shape=tuple(take_all(record, "row_shape", int, where=where)),
            owner=cast(Owner, take(record, "owner", str, where=where)),
            codec=take(record, "codec", str, where=where),
            options=_options(take(record, "options", dict, where=where), where=f"{where}.options"),
        )


def _options(record: dict[str, Any], *, where: str) -> Options:
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, float | int | str):
            raise SchemaError(f"{where}.{name}", expected="a number or a string", found=value)
    return record


@dataclass(frozen=True)
class Manifest:
    """What a store is and is meant to hold; written before its first part."""

    format_version: int
    fingerprint: Fingerprint
    arrays: tuple[ArraySpec, ...]
    teacher: dict[str, Any]  # facts that stage 2 needs, so that they are never typed twice
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
        """What every part of this store must agree with: fingerprint and arrays, nothing that may differ."""
        return digest_of({"fingerprint": self.fingerprint.to_json(), "arrays": _sorted_json(self.arrays)})

    def differences(self, other: Manifest) -> list[Difference]:
        """Every field of fingerprint and arrays in which `other` (mine) differs from this (the stored)."""
        found: list[Difference] = []
        for difference in self.fingerprint.differences(other.fingerprint):
            is_told = difference.field == "capture" and self.capture != other.capture
            found += _leaves("capture", self.capture, other.capture) if is_told else [difference]
        stored, mine = ({name: spec.to_json() for name, spec in side.specs.items()} for side in (self, other))
        for name in sorted(stored.keys() | mine.keys()):
            found += _leaves(f"arrays[{name}]", stored.get(name, NOTHING), mine.get(name, NOTHING))
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "fingerprint": self.fingerprint.to_json(),
            "arrays": [spec.to_json() for spec in self.arrays],
            "teacher": self.teacher,
            "capture": self.capture,
            "provenance": self.provenance,
            "planned_parts": list(self.planned_parts),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        check_format(record, MANIFEST)
        specs = [ArraySpec.from_json(spec) for spec in take_all(record, "arrays", dict)]
        return cls(
            format_version=FORMAT_VERSION,
            fingerprint=Fingerprint.from_json(take(record, "fingerprint", dict)),
            arrays=tuple(specs),
            teacher=take(record, "teacher", dict),
            capture=take(record, "capture", dict),
            provenance=take(record, "provenance", dict),
            planned_parts=tuple(take_all(record, "planned_parts", str)),
        )


def check_format(record: Mapping[str, Any], file: str | Path) -> None:
    """UnsupportedFormat unless the record is of the version that this code reads."""
    found = take(record, "format_version", int)
    if found != FORMAT_VERSION:
        raise UnsupportedFormat(file, found=found, readable=FORMAT_VERSION)


def _sorted_json(specs: tuple[ArraySpec, ...]) -> list[dict[str, Any]]:
    return [spec.to_json() for spec in sorted(specs, key=lambda spec: spec.name)]


def _leaves(field: str, stored: Any, mine: Any) -> list[Difference]:
    return [Difference(field, theirs, ours, key) for key, theirs, ours in leaf_differences(stored, mine)]


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
