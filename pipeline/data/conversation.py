"""LLaVA conversations to token ids and labels.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}, and may begin with one from "system"; each
"<image>" in it stands for an image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from pipeline.data.templates import IMAGE_TOKEN, TEMPLATES, Template, Turn, system_apart, token_ids
from pipeline.errors import BadSample, ConfigError
from pipeline.models.mobilevlm.tokenizer import is_chatml

ROLES = ("human", "gpt")
SYSTEM_ROLE = "system"


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids and labels: the id of a trained token, -100 elsewhere; never truncated.

    `sizes` are the numbers of vision tokens of its images, each an image token in `input_ids`. `grids` are their rows
    and columns, (0, 0) where an image's tokens are not one rectangle.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()


def tokenize(
    conversations: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> TokenizedSample:
    """Return ids, one image token for each image, and labels; raises `BadSample` where the template has no form."""
    rules = _template(template, tokenizer)
    text = rules.render(answered_turns(conversations))
    ids = token_ids(text, tokenizer)
    return TokenizedSample(tuple(ids), tuple(rules.labels(text, ids, tokenizer)))


def tokenize_prompt(
    conversations: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> list[int]:
    """Return the ids to generate the last answer from: all up to the last human turn, and the call to answer."""
    turns = checked_turns(conversations)
    if turns[-1]["from"] == "gpt":
        turns = turns[:-1]
    return token_ids(_template(template, tokenizer).render_prompt(turns), tokenizer)


def check_conversations(conversations: Any, *, num_images: int) -> None:
    """Raise `BadSample` unless turns alternate human, gpt, ..., gpt and contain each image's <image> once."""
    num_mentioned = sum(turn["value"].count(IMAGE_TOKEN) for turn in answered_turns(conversations))
    if num_mentioned == num_images:
        return
    if num_mentioned == 0:
        raise BadSample("no <image> in the text of an image sample", f"{num_images} image(s) given")
    if num_images == 0:
        raise BadSample("<image> in the text, but no image", f"{num_mentioned} asked for")
    raise BadSample("number of <image> differs from number of images", f"{num_mentioned} and {num_images}")


def template_digest(name: str) -> str:
    """Return the blake3 of a template's name and of the text it makes of a fixed exchange."""
    template = _template(name)
    turns = [{"from": "human", "value": f"Q\n{IMAGE_TOKEN}"}, {"from": "gpt", "value": "A"}]
    skeleton = [name, template.render(turns), template.render_prompt(turns[:1])]
    return blake3(json.dumps(skeleton).encode()).hexdigest()


def _template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"template: unknown name {name!r}; known are {', '.join(sorted(TEMPLATES))}.")
    rules = TEMPLATES[name]
    if tokenizer is not None and rules.is_chatml != is_chatml(tokenizer):
        raise ConfigError(
            f"template: {name!r} does not fit a tokenizer that begins texts with {tokenizer.bos_token}; "
            "use chatml with SmolLM2's tokenizer, v1 or plain with LLaMA's."
        )
    return rules


def answered_turns(conversations: Any) -> list[Turn]:
    """Return the turns of a conversation that ends with an answer. Raises `BadSample` as `checked_turns`."""
    turns = checked_turns(conversations)
    if turns[-1]["from"] != "gpt":
        raise BadSample("no answer", "the last turn is human's")
    return turns


def checked_turns(conversations: Any) -> list[Turn]:
    """Check the turns, the first of which may be the system's.

    A gpt turn before the first question answers nothing; it is dropped, as the original does.
    """
    if conversations is None:
        raise BadSample("no conversations")
    if not isinstance(conversations, list | tuple):
        raise BadSample("conversations is not a list", type(conversations).__name__)
    for number, turn in enumerate(conversations, start=1):
        _check_turn(turn, number)
    system, turns = system_apart(list(conversations))
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not turns:
        raise BadSample("empty conversations", f"{len(conversations)} turn(s), none of them human's")
    for number, turn in enumerate(turns):
        if turn["from"] != ROLES[number % 2]:
            order = ", ".join(turn["from"] for turn in conversations)
            raise BadSample("wrong role order", f"must be human, gpt, human, gpt, ...; found {order[:200]}")
    return [*system, *turns]


def _check_turn(turn: Any, number: int) -> None:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise BadSample("malformed turn", f'turn {number} must be {{"from": role, "value": text}}')
    if turn["from"] not in (*ROLES, SYSTEM_ROLE):
        raise BadSample(
            "unknown role", f"turn {number} is from {str(turn['from'])[:50]!r}, must be human or gpt"
        )
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        raise BadSample("text is not valid Unicode", f"turn {number}, character {error.start}") from error
