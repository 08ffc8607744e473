"""What a store says of itself: fingerprint, array specs, manifest; and the entries of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import StrictFloat, StrictInt

from cache.differences import NOTHING, Difference, leaf_differences
from cache.errors import SchemaError, UnsupportedFormat
from cache.format.documents import Facts, digest_of, validated
from cache.format.layout import MANIFEST, READABLE, check_array_name, check_part_name

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
    family: str = (
        ""  # of the teacher: its model type and its types of layers; "" in format 1, which does not say
    )

    def differences(self, other: Fingerprint) -> list[Difference]:
        """Return the fields in which `other` (mine) differs from this one (the stored).

        `family` is compared where both say one.
        """
        stored, mine = asdict(self), asdict(other)
        if not (self.family and other.family):
            del stored["family"]
        return [Difference(name, stored[name], mine[name]) for name in stored if stored[name] != mine[name]]

    def to_json(self) -> dict[str, str]:
        """Return the fields; `family` is left out where it is "", so that digests of format 1 stay what they were."""
        return {name: value for name, value in asdict(self).items() if value or name != "family"}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store as its user sees it; its codec decides how it is stored."""

    name: str
    axes: str  # legend letters, e.g. "R H N"; the first axis is ragged over samples or images
    row_shape: tuple[
        StrictInt | None, ...
    ]  # the sizes of the other axes; the last may be None, see `is_ragged`
    owner: Owner  # "image": one row for each distinct image of a part, samples point to it
    codec: str
    options: Options

    def __post_init__(self) -> None:
        check_array_name(self.name)
        where = f"arrays[{self.name}]"
        if self.owner not in get_args(Owner):
            raise SchemaError(f"{where}.owner", expected="'sample' or 'image'", found=self.owner)
        fixed = self.row_shape[:-1] if self.is_ragged else self.row_shape
        if any(size is None or size < 1 for size in fixed):
            expected = "positive integers, and null for the last one only"
            raise SchemaError(f"{where}.row_shape", expected=expected, found=self.row_shape)
        if len(self.axes.split()) != 1 + len(self.row_shape):
            expected = f"{1 + len(self.row_shape)} letters, for the rows and row_shape {self.row_shape}"
            raise SchemaError(f"{where}.axes", expected=expected, found=self.axes)

    @property
    def is_ragged(self) -> bool:
        """Whether the last axis is as long as the row's image has vision tokens."""
        return bool(self.row_shape) and self.row_shape[-1] is None

    @property
    def leading(self) -> tuple[int, ...]:
        """The sizes between the rows and the last axis."""
        return tuple(size for size in self.row_shape[:-1] if size is not None)

    def shape_of(self, tokens: int) -> tuple[int, ...]:
        """Return the shape of a row of an image with so many vision tokens; a fixed shape is the same for all."""
        return tuple(tokens if size is None else size for size in self.row_shape)

    def with_tokens(self, tokens: int) -> ArraySpec:
        """Return the spec of rows that are all of images with so many vision tokens."""
        return replace(self, row_shape=self.shape_of(tokens))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Manifest:
    """What a store is and is meant to hold; written before its first part."""

    format_version: StrictInt
    fingerprint: Fingerprint
    arrays: tuple[ArraySpec, ...]
    teacher: Facts  # facts that stage 2 needs, so that no config repeats them
    capture: Facts  # the resolved capture settings
    provenance: Facts  # versions, commit, command, time: may differ between runs
    planned_parts: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.arrays]
        if len(set(names)) != len(names):
            raise SchemaError("arrays", expected="each name once", found=names)
        if self.format_version == 1 and (ragged := [spec.name for spec in self.arrays if spec.is_ragged]):
            raise SchemaError("arrays", expected="fixed row shapes in format 1", found=ragged)
        for part in self.planned_parts:
            check_part_name(part)

    @property
    def specs(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self.arrays}

    def contents_digest(self) -> str:
        """Return the digest of format, fingerprint and arrays, which every part of the store must match.

        That of format 1 is without the format.
        """
        arrays = [self.specs[name].to_json() for name in sorted(self.specs)]
        contents: dict[str, Any] = {"fingerprint": self.fingerprint.to_json(), "arrays": arrays}
        return digest_of(
            contents if self.format_version == 1 else contents | {"format_version": self.format_version}
        )

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
        return asdict(self) | {"fingerprint": self.fingerprint.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Manifest:
        check_format(record, MANIFEST)
        return validated(cls, record)


def check_format(record: Mapping[str, Any], file: str | Path) -> None:
    """Raise `UnsupportedFormat` unless the record is of a version that this code reads."""
    found = record.get("format_version")
    if type(found) is not int or found not in READABLE:  # 1.0 and true equal 1
        raise UnsupportedFormat(file, found=found, readable=READABLE)


@dataclass(frozen=True)
class Span:
    """Where a member's bytes lie inside a tar."""

    file: str  # the member's name
    offset: int
    size: int


@dataclass(frozen=True)
class SampleEntry:
    """What a part's index says of one sample, beside the rows of its arrays.

    An image's name is the blake3 hex digest of its bytes, or '<digest>:<variant>' where one image is processed in
    several ways. `tokens` and `grids` are empty in format 1; a writer takes them from `add_image`, not from here.
    """

    key: str
    images: tuple[str, ...]  # names, in the sample's order
    image_spans: tuple[Span, ...]
    json_span: Span
    tokens: tuple[int, ...] = ()  # how many vision tokens each image has; 0 where the writer was not told
    grids: tuple[
        tuple[int, int], ...
    ] = ()  # rows and columns of these; (0, 0) where they form no single rectangle

    def __post_init__(self) -> None:
        if len(self.images) != len(self.image_spans):
            expected = f"one span for each of the {len(self.images)} images"
            raise SchemaError(f"entry {self.key!r}.image_spans", expected=expected, found=self.image_spans)
