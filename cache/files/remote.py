"""Files behind URLs, through fsspec: fetched in batches, tried again where a network stumbles, listed, sent."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cache.errors import StoreUnreachable

_BLOCK_BYTES = 1 << 22
_FORBIDDEN = (
    "this may also mean that it is not there, for a server that may not list answers 403 for what is absent: check "
    "the URL, then ask for the right to list (on S3 s3:ListBucket) and to read"
)

_patiently = retry(
    retry=retry_if_exception_type(StoreUnreachable),
    stop=stop_after_attempt(4),
    wait=wait_random_exponential(multiplier=0.5, max=10),
    reraise=True,
)


@_patiently
def fetch(ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes | None]:
    """The bytes start..stop of files of one server, all asked for at once; None where there is no such file.

    A server that knows no ranges sends the whole file; the range is then cut from it.
    """
    if not ranges:
        return []
    fs, _ = _filesystem(ranges[0][0])
    paths = [fs._strip_protocol(url) for url, _, _ in ranges]
    starts = [start if start or stop is not None else None for _, start, stop in ranges]
    with _told(ranges[0][0]):
        answers = fs.cat_ranges(paths, starts, [stop for _, _, stop in ranges], on_error="return")
    return [_bytes_of(answer, *asked) for answer, asked in zip(answers, ranges, strict=True)]


def _bytes_of(answer: Any, url: str, start: int, stop: int | None) -> bytes | None:
    if isinstance(answer, FileNotFoundError):
        return None
    if _is_past_the_end(answer):
        return b""
    if isinstance(answer, BaseException):
        raise _unreachable(url, answer) from answer
    whole = stop is not None and len(answer) > stop - start
    return answer[start:stop] if whole else answer


def _is_past_the_end(answer: Any) -> bool:
    """HTTP's 416, as the servers' drivers spell it."""
    refused = isinstance(answer, OSError) and answer.errno == errno.EINVAL and "range" in str(answer)
    return refused or getattr(answer, "status", None) == 416


def list_folder(url: str) -> list[str]:
    """Names of files and folders directly in a folder, sorted; none if it is absent."""
    fs, path = _filesystem(url)
    fs.invalidate_cache()
    with _told(url):
        try:
            found = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path)


def list_files(url: str) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its relative path with '/'."""
    fs, path = _filesystem(url)
    fs.invalidate_cache()
    with _told(url):
        found: dict[str, Any] = fs.find(path, detail=True)
    return {name[len(path) :].strip("/"): int(about["size"] or 0) for name, about in sorted(found.items())}


def blocks(url: str) -> Iterator[bytes]:
    """A file's bytes, one block at a time."""
    fs, path = _filesystem(url)
    with _told(url), fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


@_patiently
def download(files: Mapping[str, Path]) -> None:
    """Copy files of one server to local paths, several at a time; FileNotFoundError if one is absent."""
    first = next(iter(files))
    fs, _ = _filesystem(first)
    with _told(first):
        fs.get([fs._strip_protocol(url) for url in files], [str(target) for target in files.values()])


@_patiently
def upload(files: Mapping[str, Path | bytes], *, last: Mapping[str, Path | bytes]) -> None:
    """Put local files and bytes at URLs of one server, several at a time; `last` when all others are there."""
    first = next(iter(last))
    fs, _ = _filesystem(first)
    with _told(first):
        if "hf" in fs.protocol:
            _commit(fs, {**files, **last})
            return
        for some in (files, last):
            _put(fs, {fs._strip_protocol(url): content for url, content in some.items()})


def _put(fs: Any, contents: Mapping[str, Path | bytes]) -> None:
    local = {path: str(content) for path, content in contents.items() if isinstance(content, Path)}
    if local:
        fs.put(list(local.values()), list(local))
    small = {path: content for path, content in contents.items() if isinstance(content, bytes)}
    if small:
        fs.pipe(small)


def _commit(fs: Any, contents: Mapping[str, Path | bytes]) -> None:
    """The Hugging Face Hub takes files by commits, and few in an hour: one for all, so that they appear together."""
    from huggingface_hub import CommitOperationAdd

    places = {url: fs.resolve_path(url) for url in contents}
    operations = [
        CommitOperationAdd(places[url].path_in_repo, content if isinstance(content, bytes) else str(content))
        for url, content in contents.items()
    ]
    repository = next(iter(places.values()))
    fs._api.create_commit(
        repository.repo_id,
        operations,
        commit_message=f"alignkd push: {len(operations)} files",
        repo_type=repository.repo_type,
        revision=repository.revision,
    )
    fs.invalidate_cache()


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's driver, which fsspec keeps for the process, and the URL as that driver spells it."""
    try:
        fs: Any
        fs, path = fsspec.core.url_to_fs(url)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return fs, str(path)  # pyright: ignore[reportUnknownArgumentType]
    except (ImportError, ValueError) as error:
        raise StoreUnreachable(url, str(error), remedy=_install(url)) from error


def _install(url: str) -> str:
    protocol = url.split("://")[0]
    extra = {"s3": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}.get(protocol)
    if extra:
        return f"install what reads {protocol}:// with `pip install 'alignkd[{extra}]'`"
    return "give a local path or an s3://, gs://, hf:// or https:// URL"


@contextmanager
def _told(url: str) -> Generator[None]:
    """Whatever a driver raises as one error of ours; only that a file is absent is an answer.

    Every driver has exceptions of its own (botocore's, aiohttp's, ...), which share no root but `Exception`.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, StoreUnreachable):
        raise
    except Exception as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: BaseException) -> StoreUnreachable:
    reason = f"{type(error).__name__}: {' '.join(str(error).split()) or type(error).__name__}"
    return (
        StoreUnreachable(url, reason, remedy=_FORBIDDEN)
        if _is_forbidden(error)
        else StoreUnreachable(url, reason)
    )


def _is_forbidden(error: BaseException) -> bool:
    """HTTP's 403, as the servers' drivers spell it."""
    return isinstance(error, PermissionError) or 403 in (
        getattr(error, name, None) for name in ("status", "code", "status_code")
    )
