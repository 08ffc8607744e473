"""A JSON list, read entry by entry by Python's own parser: of a file of gigabytes one entry is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import PackError

BLOCK = 1 << 20  # characters
SPACE = " \t\n\r"
DECODER = json.JSONDecoder()


def read_json_list(path: Path) -> Iterator[Any]:
    """Yield the entries. Raises `PackError` with the place where the file stops being a JSON list."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            yield from _Reader(file).entries()
        except json.JSONDecodeError as error:
            raise PackError(
                f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
                "correct it, or name it .jsonl if each line is an entry of its own."
            ) from error
        except NoListError as error:
            raise PackError(
                f"{path} must be a JSON list of entries, found {error}; wrap an entry in [ ], and of an object that "
                "has a list of entries save that list alone."
            ) from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
            raise PackError(f"{path} is not valid JSON: {error}; save it as UTF-8.") from error


class NoListError(Exception):
    """A file holds one JSON value that is no list; the message is its type."""


class _Reader:
    """A window of text that moves through a file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.is_whole = file, "", 0, False
        self.line, self.column = 1, 1  # of the first character in the window

    def entries(self) -> Iterator[Any]:
        if self._next() != "[":
            value = self._value()
            keys = f" with the keys {', '.join(value)[:200]}" if isinstance(value, dict) else ""
            raise NoListError(f"{type(value).__name__}{keys}")
        self.at += 1
        ends = self._next() == "]"
        while not ends:
            yield self._value()
            separator = self._next()
            if separator not in (",", "]"):
                raise self._error("Expecting ',' delimiter", self.at)
            self.at += 1
            ends = separator == "]"
            self._next()
        self.at += self.text.startswith("]", self.at)
        if self._next():
            raise self._error("Extra data", self.at)

    def _value(self) -> Any:
        """Return the value that begins here; more is read until it ends before the window does."""
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.is_whole:
                    raise self._error(error.msg, error.pos) from error
            else:
                if end < len(self.text) or self.is_whole:
                    self.at = end
                    return value
            self._read(
                len(self.text)
            )  # at least twice as much: a long value is not parsed again for each block

    def _next(self) -> str:
        """Move to the next character that is no space, and return it; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self._read(0)

    def _read(self, least: int) -> None:
        """Drop what lies behind, and read at least so many characters more."""
        self.line, self.column = self._place(self.at)
        read = self.file.read(max(BLOCK, least))
        self.text, self.at, self.is_whole = self.text[self.at :] + read, 0, not read

    def _place(self, at: int) -> tuple[int, int]:
        """Return line and column of a place in the window."""
        behind = self.text[:at]
        if lines := behind.count("\n"):
            return self.line + lines, at - behind.rindex("\n")
        return self.line, self.column + at

    def _error(self, message: str, at: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, "", 0)
        error.lineno, error.colno = self._place(at)
        return error
