"""Errors about a checkpoint's file that cannot be read: one sentence for each cause, with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from pipeline.errors import ConfigError, PipelineError, is_of_the_machine, is_ours, reason_of

COPY_AGAIN = "copy or download the checkpoint again"
LFS_POINTER = b"version https://git-lfs"


@contextmanager
def named_if_broken(file: Path, *, kind: str = "weights", then: str = COPY_AGAIN) -> Iterator[None]:
    """Turn whatever a reader raises for a missing, cut or foreign file into one sentence with the file's name."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        raise _named(file, error, kind, then) from error


def _named(file: Path, error: Exception, kind: str, then: str) -> PipelineError:
    head = b""
    try:
        if not file.is_dir():
            with file.open("rb") as opened:
                head = opened.read(len(LFS_POINTER))
    except FileNotFoundError:
        return ConfigError(f"{file}: no such file, or a link to none; download what is missing")
    except OSError as refused:
        error = refused  # a reader in Rust does not always say why
    if isinstance(error, PermissionError):
        return PipelineError(f"{file}: permission denied; give this user the right to read it")
    if is_of_the_machine(error):
        return PipelineError(
            f"{file}: cannot be read ({reason_of(error)}); correct that, and run the same command again"
        )
    if head == LFS_POINTER:
        return ConfigError(
            f"{file}: a Git LFS pointer in place of the file; run `git lfs pull` in its folder, or download the file"
        )
    if isinstance(error, UnpicklingError) and "Unsupported global" in str(error):
        return ConfigError(
            f"{file}: holds more than tensors, and unpickling that could run any code; save the tensors alone, as "
            "safetensors"
        )
    # torch's own words on an UnpicklingError advise to unpickle all the same.
    words = "" if isinstance(error, UnpicklingError) else f": {reason_of(error)}"
    return ConfigError(f"{file}: not readable as {kind} ({type(error).__name__}{words}); {then}")
