"""Files that are written for others to read: their mode is the umask's, as that of any new file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file, whose library would keep it to its owner."""
    save_file(dict(tensors), str(file))
    readable_under_the_umask([file])


def readable_under_the_umask(files: Iterable[Path]) -> None:
    """Give files the mode that a new one has in their folder."""
    for file in files:
        with contextlib.suppress(OSError):  # a file system without modes, where all are alike
            file.chmod(_mode_of_new_files(file.parent))


def _mode_of_new_files(folder: Path) -> int:
    """Found with a file, not with `os.umask`, which would have to be set to be read, for all threads."""
    probe = folder / f".mode.{os.getpid()}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(descriptor).st_mode & 0o777
    finally:
        os.close(descriptor)
        probe.unlink()
