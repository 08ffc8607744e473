"""The forms in which tools write a dialogue: from a record's keys to its utterances, a role and a content each."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.data.unread import check_turn
from pipeline.errors import BadSample

Utterance = tuple[Any, Any]


@dataclass(frozen=True)
class Form:
    """A form is known by its first key; `keys` are all that its dialogue is read from."""

    keys: tuple[str, ...]
    utterances: Callable[[Mapping[str, Any]], Iterator[Utterance]]


def _listed(record: Mapping[str, Any], key: str) -> Iterator[Utterance]:
    """A list of {"from", "value"}, as LLaVA and ShareGPT have it, or of {"role", "content"}, as OpenAI has it."""
    turns = record[key]
    if not isinstance(turns, list | tuple):
        raise BadSample(f"{key} is not a list", type(turns).__name__)
    for number, turn in enumerate(turns, start=1):
        names = ("role", "content") if isinstance(turn, dict) and "role" in turn else ("from", "value")
        if not isinstance(turn, dict) or not all(name in turn for name in names):
            expected = '{"from": role, "value": text} or {"role": role, "content": text or parts}'
            raise BadSample("malformed turn", f"turn {number} must be {expected}")
        check_turn(turn, number, turn[names[0]])
        yield turn[names[0]], turn[names[1]]


def _texts(record: Mapping[str, Any]) -> Iterator[Utterance]:
    """The Cauldron and FineVision: a list of {"user", "assistant"}, an exchange each."""
    exchanges = record["texts"]
    if not isinstance(exchanges, list | tuple):
        raise BadSample("texts is not a list", type(exchanges).__name__)
    for number, exchange in enumerate(exchanges, start=1):
        if not isinstance(exchange, dict) or not {"user", "assistant"} <= exchange.keys():
            raise BadSample(
                "malformed turn", f'exchange {number} must be {{"user": text, "assistant": text}}'
            )
        yield "user", exchange["user"]
        yield "assistant", exchange["assistant"]


def _completed(record: Mapping[str, Any]) -> Iterator[Utterance]:
    """TRL: a prompt and its completion, each a list of messages or a text."""
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record.get(key), list):
            yield from _listed(record, key)
        else:
            yield role, _needed(record, key)


def _instruction(record: Mapping[str, Any]) -> Iterator[Utterance]:
    """Alpaca: an instruction with its input on the next line, and an output, after a history of pairs."""
    yield from _history(record)
    asked = [text for key in ("instruction", "input") if (text := record.get(key))]
    if not all(isinstance(text, str) for text in asked):
        raise BadSample("malformed turn", "instruction and input must be texts")
    yield "user", "\n".join(asked)
    yield "assistant", _needed(record, "output")


def _query(record: Mapping[str, Any]) -> Iterator[Utterance]:
    """ms-swift: a query and a response, after a history of pairs."""
    yield from _history(record)
    yield "user", record["query"]
    yield "assistant", _needed(record, "response")


def _history(record: Mapping[str, Any]) -> Iterator[Utterance]:
    for pair in record.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadSample("malformed turn", "history must be a list of [question, answer]")
        yield "user", pair[0]
        yield "assistant", pair[1]


def _question(record: Mapping[str, Any]) -> Iterator[Utterance]:
    """A question and its one answer, as visual question answering has them."""
    for key in ("choices", "options"):
        if record.get(key):
            raise BadSample(
                "question with choices",
                f"{key}: {reprlib.repr(record[key])}; write them into the question, and the right one as answer",
            )
    yield "user", record["question"]
    yield "assistant", _needed(record, "answer")


def _needed(record: Mapping[str, Any], key: str) -> Any:
    """Return what an exchange cannot be without. Datasets of preferences, for example, have `chosen` instead."""
    if record.get(key) is None:
        found = ", ".join(map(str, record))[:200]
        raise BadSample(
            "no prompt" if key == "prompt" else "no answer", f"{key} is missing, found {found}; name it so"
        )
    return record[key]


def _caption(key: str) -> Callable[[Mapping[str, Any]], Iterator[Utterance]]:
    """A text about an image that nobody asked for."""

    def utterances(record: Mapping[str, Any]) -> Iterator[Utterance]:
        if isinstance(record[key], str) and not record[key].strip():
            raise BadSample("no text", f"{key} is empty")
        if "<image>" in str(record[key]):
            raise BadSample(
                "caption with an <image>", f"{key} must be the caption alone; name dialogues messages"
            )
        yield "user", ""
        yield "assistant", record[key]

    return utterances


CAPTIONS = ("caption", "text")
# By the key that a form is known by; the first one that a record has counts.
FORMS: dict[str, Form] = {
    "conversations": Form(("conversations",), lambda record: _listed(record, "conversations")),
    "messages": Form(("messages",), lambda record: _listed(record, "messages")),
    "texts": Form(("texts",), _texts),
    "prompt": Form(("prompt", "completion"), _completed),
    "instruction": Form(("instruction", "input", "output", "history"), _instruction),
    "query": Form(("query", "response", "history"), _query),
    "question": Form(("question", "answer"), _question),
    **{key: Form((key,), _caption(key)) for key in CAPTIONS},
}


def form_of(record: Mapping[str, Any]) -> str:
    """Return the name of a record's form. Raises `BadSample` if it has none."""
    for name in FORMS:
        if record.get(name) is not None:
            return name
    if name := next((name for name in FORMS if name in record), None):
        raise BadSample("no text", f"{name} is empty")
    known = ", ".join(FORMS)
    raise BadSample(
        "no conversations", f"found {', '.join(map(str, record)) or 'nothing'}; known are {known}"
    )
