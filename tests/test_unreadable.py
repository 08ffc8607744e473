"""What the system refuses to read is told as that, with what to do about it, and never as damage."""

from __future__ import annotations

import errno
import os

import pytest

from cache import CorruptFile, UnreadableFile


def _error(number: int) -> UnreadableFile:
    return UnreadableFile("parts/a/part.json", OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("number", "reason", "remedy"),
    [
        (errno.EACCES, "Permission denied", "ask its owner for access"),
        (errno.EPERM, "Operation not permitted", "ask its owner for access"),
        (errno.EMFILE, "Too many open files", "`ulimit -n`"),
        (errno.ENFILE, "Too many open files in system", "`ulimit -n`"),
        (errno.EIO, "Input/output error", "says nothing about what it holds"),
        (errno.ESTALE, "Stale file handle", "says nothing about what it holds"),
    ],
)
def test_an_error_of_the_system_says_which_file_why_and_what_to_do(number: int, reason: str, remedy: str):
    message = str(_error(number))
    assert message.startswith(f"parts/a/part.json cannot be read ({reason}); ")
    assert remedy in message and "damaged" not in message and "remove" not in message
    assert not isinstance(_error(number), CorruptFile)
