"""Everything that can go wrong with a store. Messages say what was asked, what was found and what to do.

CacheError
├── StoreNotFound           there is no store where one was asked for
├── StoreUnreachable        a server does not answer, or refuses
├── NotThere                a folder where a URL was asked for, or a URL where a folder was
├── UnsupportedFormat       the store was written in a format version this code does not read
├── FormatMismatch          a store is of another format than what is to be written into it or joined with it
├── FingerprintMismatch     the store holds something else than what was asked for
├── SchemaError             a field of a record has a wrong value
├── UnsafeName              a part or array name that could leave the store's directory
├── MisusedWriter           calls of a writer that do not fit each other: a mistake in the calling code
├── ArrayMismatch           arrays handed to a writer that do not fit their specs
├── PartConflict            two stores to be merged that hold different parts of one name
├── PartLost                an unfinished part whose files another process removed
├── HoldsFewer              a part that would replace one that holds more samples, or an unknown number
├── ForeignPart             a part of another fingerprint or other arrays than its store's
├── DuplicateKey            one sample key twice
├── UnknownArray            an array name the store does not have
├── UnknownPart             a part name the store does not have
├── KeyNotInStore           a sample key the store does not have
├── RefusedValue            a value that its codec cannot keep; the sample can be rejected and the part continued
├── UnreadableFile          the system refuses to read a file, which may be sound
└── CorruptFile             a file of the store is damaged
    └── CorruptPart         ... and it belongs to a part, which can be captured again
"""

# ruff: noqa: N818 - these names say what happened; "...Error" would add nothing.
from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from cache.differences import Difference
from cache.masking import without_secrets

AnyPath = Any  # a Path or a RemotePath, which raise errors: here they are only printed


class CacheError(Exception):
    """The base of all errors that this package raises on purpose."""


class StoreNotFound(CacheError):
    def __init__(self, path: AnyPath, found: str) -> None:
        super().__init__(
            f"No teacher store at {path}: asked for a directory with a manifest.json, found {found}; "
            "write one with `alignkd teacher-cache`, or correct the path."
        )


class StoreUnreachable(CacheError):
    def __init__(
        self, url: str, reason: str, *, remedy: str = "check the URL, the network and the credentials"
    ) -> None:
        super().__init__(without_secrets(f"{url} cannot be reached ({reason}); {remedy}."))


class NotThere(CacheError):
    def __init__(self, path: AnyPath, *, asked: str) -> None:
        super().__init__(f"{path}: {asked}.")


class UnsupportedFormat(CacheError):
    def __init__(self, file: str | AnyPath, *, found: object, readable: Iterable[int]) -> None:
        self.file, self.found = file, found
        super().__init__(
            f"{file} is of store format {found!r}, this version reads formats {' and '.join(map(str, readable))}; "
            "use the alignkd version that wrote the store, or write the store again."
        )


class FormatMismatch(CacheError):
    def __init__(self, path: AnyPath, *, found: int, asked: int, remedy: str) -> None:
        super().__init__(f"The store at {path} is of format {found}, asked for was format {asked}; {remedy}.")


class FingerprintMismatch(CacheError):
    """Carries `differences`, so that a caller can print them its own way."""

    def __init__(self, path: AnyPath, differences: Iterable[Difference], *, remedy: str) -> None:
        self.differences = tuple(differences)
        listed = "; ".join(map(str, self.differences))
        super().__init__(
            f"The store at {path} holds something else than what was asked (stored -> mine): {listed}. {remedy}"
        )


class SchemaError(CacheError):
    def __init__(self, field: str, *, expected: str, found: object) -> None:
        super().__init__(f"{field}: expected {expected}, found {_short(found)}; correct this value.")


class UnsafeName(CacheError):
    def __init__(self, kind: str, name: object) -> None:
        super().__init__(
            f"{_short(name)} cannot name {kind}: use up to 150 letters, digits, '.', '_' and '-', "
            "without a leading dot and without a name that the format keeps for itself; rename it."
        )


class MisusedWriter(CacheError):
    pass


class ArrayMismatch(CacheError):
    def __init__(self, array: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"Array {array!r}: expected {expected}, found {found}; hand over what its spec says."
        )


class PartConflict(CacheError):
    def __init__(self, part: str, *, stores: tuple[AnyPath, AnyPath]) -> None:
        super().__init__(
            f"Part {part!r} is in {stores[0]} and in {stores[1]}, with different content; "
            "leave one of them out with `alignkd slice`."
        )


class PartLost(CacheError):
    def __init__(self, part: str, *, folder: AnyPath, missing: Iterable[str]) -> None:
        names = sorted(missing)
        super().__init__(
            f"Part {part!r} is not published: {len(names)} of its files, such as {names[0]}, vanished from {folder} "
            "or changed while it was written; find what else cleans there, and run the command again."
        )


class HoldsFewer(CacheError):
    """`held` is None where neither part.json nor index.json says how many samples a part holds."""

    def __init__(self, part: str, *, held: int | None, now: int) -> None:
        known = "it cannot be told how many samples it holds" if held is None else f"it holds {held} samples"
        remedy = "or allow it with `alignkd verify --fix --allow-fewer`" if now else "or remove its shard"
        super().__init__(
            f"Part {part!r} is left as it is: {known}, captured again it would hold {now}; see why samples are "
            f"rejected now, {remedy}."
        )


class ForeignPart(CacheError):
    def __init__(self, file: AnyPath, part: str) -> None:
        self.file = file
        self.detail = "the part was written for a store of another fingerprint or other arrays"
        super().__init__(
            f"{file}: {self.detail}; it is not damaged: put back the manifest.json that part {part!r} was written "
            "under, or move the part elsewhere."
        )


class DuplicateKey(CacheError):
    def __init__(self, key: str, *, parts: tuple[str, str]) -> None:
        one, other = parts
        where = f"twice in part {one!r}" if one == other else f"in parts {one!r} and {other!r}"
        super().__init__(f"Sample key {key!r} appears {where}; give every sample of all shards its own key.")


class UnknownArray(CacheError):
    def __init__(self, name: str, *, known: Iterable[str], path: AnyPath) -> None:
        super().__init__(f"The store at {path} has no array {name!r}; it has {', '.join(sorted(known))}.")


class UnknownPart(CacheError):
    def __init__(self, part: str, *, path: AnyPath, num_parts: int) -> None:
        super().__init__(
            f"The store at {path} has no finished part {part!r} among its {num_parts}; "
            "see `alignkd info`, or finish it with `alignkd teacher-cache`."
        )


class KeyNotInStore(CacheError):
    def __init__(self, key: str, *, path: AnyPath, num_samples: int, num_missing_parts: int) -> None:
        super().__init__(
            f"Sample key {key!r} is not among the {num_samples} samples of the store at {path} "
            f"({num_missing_parts} planned parts are not finished); see the parts' rejects.jsonl, "
            "or finish the store with `alignkd teacher-cache`."
        )


class RefusedValue(CacheError):
    """A codec raises it without the array's name, which it does not know."""

    def __init__(self, problem: str, *, array: str = "") -> None:
        self.problem = problem
        super().__init__(f"Array {array!r}: {problem}" if array else problem)


class UnreadableFile(CacheError):
    """Carries the system's `error`: missing permission, too many open files or a failing disk are no damage."""

    def __init__(self, file: AnyPath, error: OSError) -> None:
        self.file, self.error = file, error
        reason = f"cannot be read ({error.strerror or str(error) or type(error).__name__})"
        self.reason = f"it {reason}"
        super().__init__(f"{file} {reason}; {self.remedy}.")

    @property
    def remedy(self) -> str:
        """What to do about an error of this number."""
        if self.error.errno == errno.ENOENT:
            return "restore it or correct the path"
        if self.error.errno in (errno.EACCES, errno.EPERM):
            return "ask its owner for access, or run as a user who may read it"
        if self.error.errno in (errno.EMFILE, errno.ENFILE):
            return (
                "too many files are open at one time: raise the limit with `ulimit -n`, or use fewer workers"
            )
        return "this says nothing about what it holds: see to the file system or the disk, and try again"


class CorruptFile(CacheError):
    remedy = (
        "run `alignkd verify` on the store to see what else is damaged, and restore the file from a copy; "
        "`alignkd verify --fix --config CONFIG` writes a manifest again."
    )

    def __init__(self, file: AnyPath, detail: str, *, key: str = "") -> None:
        self.file, self.detail = file, detail
        asked = f" (reading sample {key!r})" if key else ""
        super().__init__(f"{file} is damaged{asked}: {detail}; {self.remedy}")

    def for_key(self, key: str) -> CorruptFile:
        return type(self)(self.file, self.detail, key=key)


class CorruptPart(CorruptFile):
    remedy = (
        "run `alignkd verify --deep` on the store to see what else is damaged, and "
        "`alignkd verify --fix --config CONFIG` to capture the part again."
    )


def _short(value: object, *, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
