"""The errors that `pipeline` raises: each says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LONGEST_REASON = 600  # characters of a library's own words
OUR_PACKAGES = ("pipeline", "cache")
TORCH_WRITER = "inline_container.cc"  # all that torch.save says of a full disk, beside a position
OF_THE_DISK = "make room or correct the rights, and run the same command again"
OF_THE_MEMORY = "free memory, or take a smaller model, dtype or batch"
# Raised by a line of ours, these are a mistake in it, and need their traceback.
MISTAKES = (AttributeError, NameError, AssertionError, LookupError, TypeError)


class PipelineError(ValueError):
    """Something outside the program (a file, a setting, a sample) is not as it must be."""


class ConfigError(PipelineError):
    """A setting, or a file that a setting names, cannot be used."""


class ShardError(PipelineError):
    """A shard as a whole cannot be read; none of its samples may be trusted."""


class PackError(PipelineError):
    """Annotations cannot be packed into shards."""


class JoinError(PipelineError):
    """A sample and what the store holds for it do not belong together."""


class BadSample(PipelineError):  # noqa: N818 - it names the thing that is rejected
    """One sample cannot be used. It is listed with its reason and counted; the run goes on.

    `kind` is a fixed phrase to count by ("missing image file"), `detail` what was found in this sample.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(self.reason)

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        # Exceptions pickle by `args`, which is the whole reason here; worker processes must keep both parts.
        return (type(self), (self.kind, self.detail))


class TrainingStopped(BaseException):  # no error: like an interrupt, nothing may catch it and carry on
    """SIGTERM or Ctrl-C ended a training after a step; its checkpoint is written."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@contextmanager
def building(what: str, *, then: str) -> Iterator[None]:
    """Makes one sentence of what a library raises while it builds `what`; `then` says what to do.

    `ConfigError` where a setting is at fault, `PipelineError` where the disk or the memory is. Our own errors, and
    mistakes in our own lines, are left as they are. Never around a training: there an error needs its traceback.
    """
    try:
        yield
    except Exception as error:
        if is_ours(error) or _is_mistake(error):
            raise
        if is_of_the_machine(error):
            then = OF_THE_DISK if isinstance(error, OSError) else OF_THE_MEMORY
            raise PipelineError(f"{what}: {reason_of(error)}; {then}") from error
        raise ConfigError(f"{what}: {reason_of(error)}; {then}") from error


@contextmanager
def needing(extra: str, *, by: str, otherwise: str = "") -> Iterator[None]:
    """Turn a missing package into one sentence: what needs it, the extra that installs it, what to do otherwise."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in OUR_PACKAGES:
            raise
        raise ConfigError(
            f"{by} needs the package {error.name}, which is not installed; run `pip install 'alignkd[{extra}]'`"
            f"{f', or {otherwise}' if otherwise else ''}"
        ) from error


@contextmanager
def writing(target: Path | str, *, then: str = "make room, and run the same command again") -> Iterator[None]:
    """Names the file or folder that cannot be written: what a write or fsync raises on a full disk names none."""
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error):
            raise
        reason = "is the disk full?" if TORCH_WRITER in str(error) else reason_of(error)
        raise PipelineError(f"{target}: cannot be written ({reason}); {then}") from error


def _is_of_writing(error: Exception) -> bool:
    """Whether the system refused to write, or safetensors or torch say that it did."""
    is_torchs = isinstance(error, RuntimeError) and (TORCH_WRITER in str(error) or "write(): " in str(error))
    return isinstance(error, OSError) or type(error).__module__.startswith("safetensors") or is_torchs


def is_ours(error: Exception) -> bool:
    """Whether an error is one that this program raises on purpose."""
    return type(error).__module__.partition(".")[0] in OUR_PACKAGES


def _is_mistake(error: Exception) -> bool:
    """Whether an error shows a mistake in a line of this program, and is nothing that a library says."""
    *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
    package = str(raised_in.f_globals.get("__name__")).partition(".")[0]
    return isinstance(error, MISTAKES) and package in OUR_PACKAGES


def is_of_the_machine(error: Exception) -> bool:
    """Whether disk, memory or rights are at fault, and no setting."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def reason_of(error: Exception) -> str:
    """A library's own words on one line; its error's name where they say nothing."""
    words = " ".join(str(error).split()).rstrip(".")
    if not words or isinstance(error, LookupError):  # a KeyError's words are the key alone
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."


def did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    """The nearest known name as a question, else all known names if they are few."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 20 else ""
