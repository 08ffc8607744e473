"""The store's JSON files: canonical bytes that carry their checksum, so that any changed byte is found."""

from __future__ import annotations

import json
from typing import Any, cast

from cache.errors import CorruptFile, UnreadableFile
from cache.files.durable import hash_bytes
from cache.files.place import Place

CHECKSUM = "checksum"


def canonical_json(value: object) -> bytes:
    """The one spelling of `value`: sorted keys, no spaces, ASCII, a newline at the end."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def digest_of(value: object) -> str:
    """blake3 of a JSON value, whatever the order of its keys."""
    return hash_bytes(canonical_json(value))


def document_bytes(content: dict[str, Any]) -> bytes:
    """`content` as the bytes of a file, with the checksum of all of it added."""
    return canonical_json({**content, CHECKSUM: digest_of(content)})


def read_document(path: Place, data: bytes | None = None) -> dict[str, Any]:
    """The content that `document_bytes` was given; CorruptFile if one byte of the file differs, or it is gone.

    `data` are the file's bytes, where they were read before. UnreadableFile if the system refuses to read it.
    """
    try:
        data = path.read_bytes() if data is None else data
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptFile(path, f"it cannot be read ({error.strerror})") from error
    except OSError as error:
        raise UnreadableFile(path, error) from error
    try:
        document = json.loads(data)
        canonical = canonical_json(document)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(path, f"it is not JSON ({error})") from error
    return _checked_content(path, document, same_bytes=data == canonical)


def _checked_content(path: Place, document: object, *, same_bytes: bool) -> dict[str, Any]:
    if not isinstance(document, dict) or not same_bytes:
        raise CorruptFile(path, "its bytes are not the canonical JSON object this format writes")
    content = cast(dict[str, Any], document)
    stored = content.pop(CHECKSUM, None)
    if stored != digest_of(content):
        raise CorruptFile(path, f"its checksum is {digest_of(content)}, but it says {stored!r}")
    return content
