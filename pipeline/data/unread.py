"""The check that an entry says nothing that would be lost in turns of text and images, such as calls of tools."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pipeline.errors import BadSample

ASKING = ("user", "human", "system", "developer")  # roles whose turns are never trained
SAID_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal")
TRAINED = ("weight", "loss", "train")  # of OpenAI, ms-swift and Axolotl: whether an answer is trained
TOOLS = ("tools", "functions")
IS_GOOD = ("label", "kto_tag")  # of TRL and ms-swift, and of LLaMA-Factory: false for an answer to be avoided
# What other models and tools write into a text for an image or a place in one, or between turns.
MARKS = re.compile(
    r"<\|[A-Za-z_]+\d*\|>|<(image|img)[ _-]?\d+>|<ImageHere>|<image[ _-]?placeholder>|<img>|\[IMG\]|<__media__>"
    r"|<(video|audio|bbox|ref-object)>"
)


def check_turn(turn: Mapping[str, Any], number: int, role: Any) -> None:
    """Raise `BadSample` for a turn that says more than its text, or for an answer that is not to be trained."""
    for key in SAID_BESIDE:
        if turn.get(key):
            raise BadSample("more than text and images", _found(f"turn {number} has {key}", turn[key]))
    for key in TRAINED:
        if role not in ASKING and turn.get(key) not in (None, 1):
            raise BadSample(
                "answer that is not to be trained",
                f"turn {number} has {key}: {reprlib.repr(turn[key])}, but every answer is trained; remove "
                "the key, or end the entry before this turn",
            )


def check_entry(record: Mapping[str, Any]) -> None:
    """Raise `BadSample` for an entry with tools, or whose answer is marked as bad."""
    for key in TOOLS:
        if record.get(key) not in (None, "", "[]", [], {}):
            raise BadSample("more than text and images", _found(key, record[key]))
    for key in IS_GOOD:
        if record.get(key) is False:
            raise BadSample("answer that is marked as bad", f"{key}: False; only good answers can be trained")


def check_marks(text: str, number: int) -> None:
    """Raise `BadSample` for a text with another tool's mark, which would be read as text."""
    if found := MARKS.search(text):
        raise BadSample(
            "mark of another tool",
            f"turn {number} holds {found[0]!r}, which would be text; write <image> for an image, and remove others",
        )


def _found(what: str, value: object) -> str:
    return (
        f"{what}: {reprlib.repr(value)}; only text and images can be read; remove the key if they stand alone"
    )
