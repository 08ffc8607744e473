"""Imports of ExecuTorch, which is an extra and may lie in a folder of its own.

ExecuTorch needs torchao. Where that is installed beside transformers, every program that loads a model imports it: it
takes seconds and prints warnings. So `make setup` installs both in the folder `executorch` of the environment.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.import_utils import is_torchao_available

from pipeline.errors import needing

EXTRA = FOLDER = "executorch"
# torchao reports the GPU kernels that it cannot load, and torch its old ways of registering constants.
CHATTY = ("torchao", "torch.utils._pytree")


def is_installed() -> bool:
    """Return whether ExecuTorch can be imported, from the environment or from the folder in it."""
    return importlib.util.find_spec("executorch") is not None or _folder().is_dir()


@contextmanager
def importing(*, by: str) -> Iterator[None]:
    """Import ExecuTorch inside this block. Raises `ConfigError` if it is not installed; `by` is what needs it."""
    _find_folder()
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with needing(EXTRA, by=by), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hidden() -> Iterator[None]:
    """Leave the folder out of the path: a process that is started here inherits it, and would import torchao."""
    before = list(sys.path)
    sys.path[:] = [place for place in before if place != str(_folder())]
    try:
        yield
    finally:
        sys.path[:] = before


def _find_folder() -> None:
    """Put the folder last on the path, unless ExecuTorch can be imported without it."""
    if _folder().is_dir() and importlib.util.find_spec("executorch") is None:
        is_torchao_available()  # transformers keeps this answer, and so does without torchao in this process
        sys.path.append(str(_folder()))


def _folder() -> Path:
    return Path(sys.prefix) / FOLDER
