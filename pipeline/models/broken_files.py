"""What is wrong with a file of a checkpoint that cannot be read, and what to do: each cause its own sentence."""

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
    """Whatever a reader says of a missing, cut or foreign file becomes one sentence that names it, and its cause."""
    try:
        yield
    except Exception as error:
        if is_ours(error):
            raise
        raise _named(file, error, kind, then) from error


def _named(file: Path, error: Exception, kind: str, then: str) -> PipelineError:
    try:
        head = b"" if file.is_dir() else _head(file)
    except FileNotFoundError:
        return ConfigError(f"{file}: no such file, or a link to none; download what is missing")
    except OSError as refused:
        head, error = b"", refused  # a reader in Rust does not always say why
    if isinstance(error, PermissionError):
        return PipelineError(f"{file}: permission denied; give this user the right to read it")
    if is_of_the_machine(error):
        return PipelineError(
            f"{file}: cannot be read ({reason_of(error)}); correct that, and run the same command again"
        )
    if head.startswith(LFS_POINTER):
        return ConfigError(
            f"{file}: a Git LFS pointer in place of the file; run `git lfs pull` in its folder, or download the file"
        )
    if isinstance(error, UnpicklingError) and "Unsupported global" in str(error):
        return ConfigError(
            f"{file}: holds more than tensors, which nothing here unpickles, for it could run any code; save the "
            "tensors alone, as safetensors"
        )
    said = type(error).__name__
    if not isinstance(error, UnpicklingError):  # torch's words advise to unpickle it all the same
        said = f"{said}: {reason_of(error)}"
    return ConfigError(f"{file}: not readable as {kind} ({said}); {then}")


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER))
