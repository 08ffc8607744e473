"""Whole files behind URLs: which there are, their sizes and versions, and their bytes from front to back."""

from __future__ import annotations

import glob
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec.asyn  # pyright: ignore[reportMissingTypeStubs]

from cache.errors import StoreUnreachable
from cache.files.remote import ATTEMPTS, driver_errors, fetch_once, filesystem, retried, unreachable

_AT_ONCE = 32  # questions about files
_BLOCK_BYTES = 1 << 22
_FIRST_AHEAD, _MOST_AHEAD = 2, 8  # blocks that are fetched at once: few for who reads the head of a file only
_SECONDS_OF_SILENCE = 60  # of a server that sends a file as it comes
_sync: Any = fsspec.asyn.sync  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
# What drivers call the server's own name of a file's content.
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "Last-Modified", "LastModified")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL. `size` is None, and `version` "", where the server does not say."""

    url: str
    size: int | None
    version: str = ""


def stat_files(urls: Sequence[str]) -> list[RemoteFile | None]:
    """Return size and version of each file, None where there is none; the server is asked for all at once."""
    for fs in {id(fs): fs for fs, _ in map(filesystem, urls)}.values():
        fs.invalidate_cache()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_stat, urls))


@retried
def _stat(url: str) -> RemoteFile | None:
    fs, path = filesystem(url)
    with driver_errors(url):
        try:
            about = fs.info(path)
        except FileNotFoundError as error:
            # fsspec's driver of HTTP reports every failure so.
            cause = error.__cause__
            if _is_web(fs) and cause is not None and getattr(cause, "status", None) not in (404, 410):
                raise unreachable(url, cause) from error
            return None
    return _file(url, about) if about["type"] == "file" else None


def _file(url: str, about: Mapping[str, Any]) -> RemoteFile:
    version = next((str(about[name]) for name in _VERSIONS if about.get(name)), "")
    return RemoteFile(url, about.get("size"), version.strip('"'))


def is_glob(url: str) -> bool:
    """Return whether a URL is a pattern of several; in a web address "?" begins the query."""
    scheme, _, path = url.partition("://")
    if scheme in ("http", "https"):
        path = path.partition("/")[2].partition("?")[0].replace("?", "")
    return glob.has_magic(path)


@retried
def find_files(url: str) -> list[RemoteFile]:
    """Return the files directly in a folder, or those that a glob matches; none of a server that does not list."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    with driver_errors(url):
        try:
            found = fs.glob(path, detail=True).values() if is_glob(url) else fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [_file(fs.unstrip_protocol(one["name"]), one) for one in found if one["type"] == "file"]


@retried
def has_ranges(url: str) -> bool:
    """Return whether the server sends a part of the file where a part is asked for. Some web servers do not."""
    fs, path = filesystem(url)
    if not _is_web(fs):
        return True
    with driver_errors(url):
        return _sync(fs.loop, _sends_first_byte, fs, path)


async def _sends_first_byte(fs: Any, url: str) -> bool:
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": "bytes=0-0"}
    async with session.get(fs.encode_url(url), headers=headers, **options) as answer:  # the body is not read
        if answer.status != 416:  # a server that is overloaded says nothing about ranges
            answer.raise_for_status()
        return answer.status in (206, 416)


def _is_web(fs: Any) -> bool:
    return "http" in fs.protocol and hasattr(fs, "set_session")


def stream_file(file: RemoteFile, *, by_ranges: bool = True) -> Iterator[bytes]:
    """Yield a file's bytes from front to back, fetched ahead; a failed request is repeated.

    By ranges several blocks come at once. Else there is one request, for which no size need be known. Raises
    `StoreUnreachable` if the server goes on failing or sends less than the file.
    """
    if file.size is None or not by_ranges:
        return _as_it_comes(file)
    return _by_ranges(file.url, file.size)


def _by_ranges(url: str, size: int) -> Iterator[bytes]:
    starts = iter(range(0, size, _BLOCK_BYTES))
    coming: deque[Future[bytes]] = deque()
    ahead = _FIRST_AHEAD
    pool = ThreadPoolExecutor(_MOST_AHEAD)
    try:
        while True:
            for start in islice(starts, ahead - len(coming)):
                coming.append(pool.submit(_block, url, start, min(start + _BLOCK_BYTES, size)))
            if not coming:
                return
            yield coming.popleft().result()
            ahead = min(ahead + 1, _MOST_AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


@retried
def _block(url: str, start: int, stop: int) -> bytes:
    [data] = fetch_once([(url, start, stop)])
    if data is None or len(data) != stop - start:
        found = "no such file any more" if data is None else f"{len(data):,} bytes of {stop - start:,}"
        raise StoreUnreachable(url, f"asked for bytes from {start:,} on, found {found}")
    return data


def _as_it_comes(file: RemoteFile) -> Iterator[bytes]:
    """Yield a file's bytes of one request. After a failure it is repeated, and what came already is left out."""
    held = failures = 0
    while True:
        try:
            for block in _get(file, skip=held):
                held += len(block)
                yield block
            if file.size is None or held >= file.size:
                return
            raise StoreUnreachable(file.url, f"{held:,} bytes came of {file.size:,}")
        except StoreUnreachable:
            failures += 1
            if failures == ATTEMPTS:
                raise
            time.sleep(failures)


def _get(file: RemoteFile, *, skip: int) -> Iterator[bytes]:
    fs, path = filesystem(file.url)
    with driver_errors(file.url):
        session = _sync(fs.loop, fs.set_session)
        # By default aiohttp allows five minutes in all, which a large file may well take.
        timeout = type(session.timeout)(total=None, sock_read=_SECONDS_OF_SILENCE)
        # As stored: a server may call a .tar.gz a tar that is compressed for the transfer.
        headers = {**fs.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
        asked = {"timeout": timeout, "headers": headers, "auto_decompress": False}
        # With any size fsspec's driver does not ask for it.
        with fs.open(path, "rb", block_size=0, size=file.size or 1, **asked) as opened:
            while block := opened.read(1 << 20):
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))
