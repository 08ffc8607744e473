"""The store's JSON files: canonical bytes with a checksum, so that any changed byte is found; and their fields."""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError

from cache.differences import NOTHING
from cache.errors import CorruptFile, SchemaError
from cache.files.any_path import AnyPath, read_file
from cache.files.durable import hash_bytes

CHECKSUM = "checksum"
_MAX_DEPTH = 32
T = TypeVar("T")


def _of_bounded_depth(value: Any, levels: int = _MAX_DEPTH) -> Any:
    """Return a JSON value whose depth no later walk over it, such as `asdict`, has to fear."""
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError(f"lists and objects nested at most {_MAX_DEPTH} deep")
        inner = cast(Iterable[Any], value.values() if isinstance(value, dict) else value)
        for one in inner:
            _of_bounded_depth(one, levels - 1)
    return cast(Any, value)


Facts = Annotated[dict[str, Any], AfterValidator(_of_bounded_depth)]
"""A field that holds any JSON object."""


def canonical_json(value: object) -> bytes:
    """Return the one spelling of a JSON value: sorted keys, no spaces, ASCII, a newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def digest_of(value: object) -> str:
    """Return the blake3 of a JSON value, in hex, which does not depend on the order of keys."""
    return hash_bytes(canonical_json(value))


def document_bytes(content: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON file: `content`, and the checksum of all of it."""
    return canonical_json({**content, CHECKSUM: digest_of(content)})


def read_document(path: AnyPath, data: bytes | None = None) -> dict[str, Any]:
    """Return the content of a file that `document_bytes` made; `data` are its bytes, if they are known already.

    Raises `CorruptFile` if one byte of the file differs or it is gone, `UnreadableFile` if the system refuses.
    """
    if data is None and (data := read_file(path)) is None:
        raise CorruptFile(path, f"it cannot be read ({os.strerror(errno.ENOENT)})")
    try:
        document: Any = json.loads(data)
        is_canonical = canonical_json(document) == data and type(document) is dict
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"it is not JSON ({error})") from error
    if not is_canonical:
        raise CorruptFile(path, "its bytes are not the canonical JSON object this format writes")
    content = cast(dict[str, Any], document)
    stored = content.pop(CHECKSUM, None)
    if stored != (found := digest_of(content)):
        raise CorruptFile(path, f"its checksum is {found}, but it says {stored!r}")
    return content


def validated(kind: type[T], value: object) -> T:
    """Return a dataclass made from a JSON value. Raises `SchemaError` naming the first field that is wrong."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Where a field may be of several types, pydantic also names the type that it tried.
        keys = [key for key in first["loc"] if key not in ("int", "float", "str")]
        field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
        if first["type"] == "missing":
            raise SchemaError(field, expected="a value", found=NOTHING) from None
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        raise SchemaError(field, expected=expected, found=first["input"]) from None


@functools.cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
