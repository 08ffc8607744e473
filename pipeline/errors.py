"""The errors of `pipeline`. A message says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache import without_secrets

LONGEST_REASON = 600  # characters of a library's own message
OUR_PACKAGES = ("pipeline", "cache")
TORCH_WRITER = "inline_container.cc"  # torch.save reports a full disk by this name and a position alone
OF_THE_DISK = "make room or correct the rights, and run the same command again"
OF_THE_MEMORY = "free memory, or take a smaller model, dtype or batch"
# Raised by a line of this program, these show a mistake in it and need their traceback.
MISTAKES = (AttributeError, NameError, AssertionError, LookupError, TypeError)


class PipelineError(ValueError):
    """Something outside the program (a file, a setting, a sample) is not as it must be. Tokens in URLs are masked."""

    def __init__(self, *told: str) -> None:
        super().__init__(*map(without_secrets, told))


class ConfigError(PipelineError):
    """A setting, or a file that a setting names, cannot be used."""


class ShardError(PipelineError):
    """A shard as a whole cannot be read; none of its samples may be trusted."""


class PackError(PipelineError):
    """Annotations cannot be packed into shards."""


class JoinError(PipelineError):
    """A sample and what the store holds for it do not belong together."""


class BadSample(PipelineError):  # noqa: N818 - it names the thing that is rejected
    """One sample cannot be used. It is counted and listed with its reason, and the run continues.

    `kind` is a fixed phrase to count by ("missing image file"), `detail` is what was found in this sample.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)  # both, because exceptions pickle by their arguments
        self.kind, self.detail = kind, detail

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    def __str__(self) -> str:
        return self.reason


class TrainingStopped(BaseException):  # like KeyboardInterrupt: `except Exception` must not catch it
    """SIGTERM or Ctrl-C ended a training after a step, with a checkpoint."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@contextmanager
def building(what: str, *, then: str) -> Iterator[None]:
    """Turn the error of a library that builds `what` into one sentence; `then` is what to do.

    Raises `PipelineError` if the disk or the memory is at fault, else `ConfigError`. Our own errors, and mistakes in
    this program, pass unchanged. Do not use it around a training, whose errors need their traceback.
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
    """Turn a failed write into a `PipelineError` that names `target`, which the error of a full disk does not."""
    try:
        yield
    except Exception as error:
        if not _is_of_writing(error):
            raise
        reason = "is the disk full?" if TORCH_WRITER in str(error) else reason_of(error)
        raise PipelineError(f"{target}: cannot be written ({reason}); {then}") from error


def _is_of_writing(error: Exception) -> bool:
    """Whether the system refused to write, or safetensors or torch report that it did."""
    is_torchs = isinstance(error, RuntimeError) and (TORCH_WRITER in str(error) or "write(): " in str(error))
    return isinstance(error, OSError) or type(error).__module__.startswith("safetensors") or is_torchs


def is_ours(error: Exception) -> bool:
    """Whether this program raises the error on purpose."""
    return type(error).__module__.partition(".")[0] in OUR_PACKAGES


def _is_mistake(error: Exception) -> bool:
    """Whether the error was raised by a mistake in a line of this program."""
    *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
    package = str(raised_in.f_globals.get("__name__")).partition(".")[0]
    return isinstance(error, MISTAKES) and package in OUR_PACKAGES


def is_of_the_machine(error: Exception) -> bool:
    """Whether disk, memory or rights are at fault, rather than a setting."""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def reason_of(error: Exception) -> str:
    """Return a library's message on one line, with the name of its error where the message says too little."""
    words = " ".join(str(error).split()).rstrip(".")
    if not words or isinstance(error, LookupError):  # the message of a KeyError is only the key
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."


def did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    """Return the nearest known name as a question, else all known names if they are few, else ''."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 20 else ""
