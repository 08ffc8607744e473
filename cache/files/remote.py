"""Files behind URLs, through fsspec: fetched in batches, retried when a server fails, listed, uploaded."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec  # pyright: ignore[reportMissingTypeStubs]
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from cache.errors import StoreUnreachable
from cache.files.durable import hash_opened

_BLOCK_BYTES = 1 << 22
_THREADS = 16
_EXTRAS = {
    "s3": "s3",
    "gs": "gs",
    "gcs": "gs",
    "http": "http",
    "https": "http",
}  # protocol -> extra of this package
_FORBIDDEN = (
    "this may also mean that it is not there, for a server that may not list answers 403 for what is absent: check "
    "the URL, then ask for the right to list (on S3 s3:ListBucket) and to read"
)

RangeOfUrl = tuple[str, int, int | None]  # start and stop; without a stop, to its end
Answer = bytes | StoreUnreachable | None

ATTEMPTS = 4
MORE_ATTEMPTS = 8  # in about 20 seconds
_answered: set[tuple[str, str]] = set()  # servers, by scheme and name
retried = retry(
    retry=retry_if_exception_type(StoreUnreachable),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_random_exponential(multiplier=0.5, max=10),
    reraise=True,
)


def fetch(ranges: Sequence[RangeOfUrl]) -> list[bytes | None]:
    """Do as `fetch_once`; what a server failed to send is asked for again, without what has come.

    A server that has answered before is asked for longer: a training should not end where a server starts anew.
    """
    if not ranges:
        return []
    found: dict[RangeOfUrl, bytes | None] = {}
    filesystem(ranges[0][0])  # a driver that is missing now is missing later
    server = urlsplit(ranges[0][0])[:2]

    @retried
    def fetch_rest() -> None:
        rest = [asked for asked in dict.fromkeys(ranges) if asked not in found]
        answers = dict(zip(rest, _fetched(rest), strict=True))
        found.update({asked: it for asked, it in answers.items() if not isinstance(it, StoreUnreachable)})
        _raise_first(answers.values())

    attempts = MORE_ATTEMPTS if server in _answered else ATTEMPTS
    fetch_rest.retry_with(stop=stop_after_attempt(attempts))()
    _answered.add(server)
    return [found[asked] for asked in ranges]


def fetch_once(ranges: Sequence[RangeOfUrl]) -> list[bytes | None]:
    """Return the bytes start..stop of files of one server, all requested at once; None where there is no file.

    A server without range requests sends the whole file; the range is then cut from it.
    """
    return _raise_first(_fetched(ranges))


def _raise_first(answers: Iterable[Answer]) -> list[bytes | None]:
    """Return the answers if none of them is an error."""
    received: list[bytes | None] = []
    for answer in answers:
        if isinstance(answer, StoreUnreachable):
            raise answer
        received.append(answer)
    return received


def _fetched(ranges: Sequence[RangeOfUrl]) -> list[Answer]:
    if not ranges:
        return []
    fs, _ = filesystem(ranges[0][0])
    paths = [fs._strip_protocol(url) for url, _, _ in ranges]
    # fsspec: a start of None with a stop of None is a plain GET, which servers without range requests answer too.
    starts = [start if start or stop is not None else None for _, start, stop in ranges]
    with driver_errors(ranges[0][0]):
        answers = _cat(fs, paths, starts, [stop for _, _, stop in ranges])
    return [_bytes_of(answer, *asked) for answer, asked in zip(answers, ranges, strict=True)]


def _cat(fs: Any, paths: list[str], starts: list[int | None], stops: list[int | None]) -> list[Any]:
    """Return each range's bytes or error, all asked for at once also of a driver that asks one after the other."""
    if getattr(fs, "async_impl", False):
        return fs.cat_ranges(paths, starts, stops, on_error="return")
    with ThreadPoolExecutor(_THREADS) as pool:
        each = pool.map(
            lambda *one: fs.cat_ranges(*([x] for x in one), on_error="return"), paths, starts, stops
        )
        return [answer for answers in each for answer in answers]


def _bytes_of(answer: Any, url: str, start: int, stop: int | None) -> Answer:
    if isinstance(answer, FileNotFoundError):
        return None
    if _is_past_the_end(answer):
        return b""
    if isinstance(answer, BaseException):
        return unreachable(url, answer)
    is_whole_file = stop is not None and len(answer) > stop - start
    return answer[start:stop] if is_whole_file else answer


def _is_past_the_end(answer: Any) -> bool:
    """Return whether a driver's answer means HTTP 416, range not satisfiable."""
    refused = isinstance(answer, OSError) and answer.errno == errno.EINVAL and "range" in str(answer)
    return refused or getattr(answer, "status", None) == 416


def list_folder(url: str) -> list[str]:
    """Return the sorted names of files and folders directly in a folder; none if it is absent."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    with driver_errors(url):
        try:
            found = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path)


def list_files(url: str) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its relative path with '/'."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    with driver_errors(url):
        found: dict[str, Any] = fs.find(path, detail=True)
    return {name[len(path) :].strip("/"): int(about["size"] or 0) for name, about in sorted(found.items())}


def hash_file(url: str) -> str:
    """Return the blake3 of a file's bytes, in hex, fetched block by block."""
    fs, path = filesystem(url)
    with driver_errors(url), fs.open(path, "rb", block_size=_BLOCK_BYTES) as file:
        return hash_opened(file)


@retried
def download(files: Mapping[str, Path]) -> None:
    """Copy files of one server to local paths, several at a time; FileNotFoundError if one is absent."""
    first = next(iter(files))
    fs, _ = filesystem(first)
    with driver_errors(first):
        fs.get([fs._strip_protocol(url) for url in files], [str(target) for target in files.values()])


@retried
def upload(files: Mapping[str, Path | bytes], *, last: Mapping[str, Path | bytes]) -> None:
    """Put local files and bytes at URLs of one server, several at a time; those of `last` after all others."""
    first = next(iter(last))
    fs, _ = filesystem(first)
    with driver_errors(first):
        if "hf" in fs.protocol:
            _commit(fs, {**files, **last})
            return
        for some in (files, last):
            paths = {fs._strip_protocol(url): content for url, content in some.items()}
            if local := {path: str(file) for path, file in paths.items() if isinstance(file, Path)}:
                fs.put(list(local.values()), list(local))
            if small := {path: content for path, content in paths.items() if isinstance(content, bytes)}:
                fs.pipe(small)


def _commit(fs: Any, contents: Mapping[str, Path | bytes]) -> None:
    """Upload to the Hugging Face Hub: all files in one commit, as the Hub limits commits per hour."""
    from huggingface_hub import CommitOperationAdd

    resolved = {url: fs.resolve_path(url) for url in contents}
    operations = [
        CommitOperationAdd(
            resolved[url].path_in_repo, content if isinstance(content, bytes) else str(content)
        )
        for url, content in contents.items()
    ]
    repository = next(iter(resolved.values()))
    fs._api.create_commit(
        repository.repo_id,
        operations,
        commit_message=f"alignkd push: {len(operations)} files",
        repo_type=repository.repo_type,
        revision=repository.revision,
    )
    fs.invalidate_cache()


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's driver, one per process, and the URL as that driver spells it."""
    try:
        fs: Any
        fs, path = fsspec.core.url_to_fs(url)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return fs, str(path)  # pyright: ignore[reportUnknownArgumentType]
    except (ImportError, ValueError) as error:
        protocol = url.split("://")[0]
        remedy = "give a local path or an s3://, gs://, hf:// or https:// URL"
        if extra := _EXTRAS.get(protocol):
            remedy = f"install what reads {protocol}:// with `pip install 'alignkd[{extra}]'`"
        raise StoreUnreachable(url, str(error), remedy=remedy) from error


@contextmanager
def driver_errors(url: str) -> Generator[None]:
    """Raise whatever a driver raises as `StoreUnreachable`; only that a file is absent passes.

    Every driver has exceptions of its own (botocore's, aiohttp's, ...), whose only common base is `Exception`.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, StoreUnreachable):
        raise
    except Exception as error:
        raise unreachable(url, error) from error


def unreachable(url: str, error: BaseException) -> StoreUnreachable:
    """Return a driver's error as ours."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split()) or type(error).__name__}"
    # Drivers keep HTTP's 403 under different names.
    codes = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    if isinstance(error, PermissionError) or 403 in codes:
        return StoreUnreachable(url, reason, remedy=_FORBIDDEN)
    return StoreUnreachable(url, reason)
