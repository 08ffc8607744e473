"""LLaVA conversations to token ids and labels, with the original code's templates `plain` and `v1`.

A conversation is a list of turns {"from": "human" | "gpt", "value": text}; "<image>" in it is an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3
from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadSample, ConfigError
from pipeline.models.merge import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from pipeline.tokenizer import load_tokenizer, tokenizer_digest

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "IMAGE_TOKEN_INDEX",
    "TEMPLATES",
    "Template",
    "TokenizedSample",
    "check_conversations",
    "load_tokenizer",
    "template_digest",
    "tokenize",
    "tokenize_prompt",
    "tokenizer_digest",
]

IMAGE_TOKEN = "<image>"
ROLES = ("human", "gpt")

Turn = dict[str, str]


@dataclass(frozen=True)
class TokenizedSample:
    """Ids with -200 for each image, and labels of equal length: the id where trained, -100 elsewhere.

    No truncation: the longest allowed sequence is the caller's business.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """How turns become one text, and which of its tokens are trained."""

    render: Callable[[Sequence[Turn]], str]
    render_prompt: Callable[[Sequence[Turn]], str]
    labels: Callable[[str, list[int], PreTrainedTokenizerBase], list[int]]


def tokenize(
    conversations: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> TokenizedSample:
    """Ids and labels of a whole conversation; raises `BadSample` where the template cannot express it."""
    rules = _template(template)
    turns = _turns(conversations)
    if turns[-1]["from"] != "gpt":
        raise BadSample("no answer", "the last turn is human's")
    text = rules.render(turns)
    ids = _ids(text, tokenizer)
    return TokenizedSample(tuple(ids), tuple(rules.labels(text, ids, tokenizer)))


def tokenize_prompt(
    conversations: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, template: str
) -> list[int]:
    """Ids to generate the last answer from: everything up to the last human turn, and the call to answer."""
    turns = _turns(conversations)
    if turns[-1]["from"] == "gpt":
        turns = turns[:-1]
    return _ids(_template(template).render_prompt(turns), tokenizer)


def check_conversations(conversations: Any, *, num_images: int) -> None:
    """Raise `BadSample` unless turns alternate human, gpt, ..., gpt and mention each image once."""
    turns = _turns(conversations)
    if turns[-1]["from"] != "gpt":
        raise BadSample("no answer", "the last turn is human's")
    num_mentioned = sum(turn["value"].count(IMAGE_TOKEN) for turn in turns)
    if num_mentioned == num_images:
        return
    if num_mentioned == 0:
        raise BadSample("no <image> in the text of an image sample", f"{num_images} image(s) given")
    if num_images == 0:
        raise BadSample("<image> in the text, but no image", f"{num_mentioned} asked for")
    raise BadSample("number of <image> differs from number of images", f"{num_mentioned} and {num_images}")


def template_digest(name: str) -> str:
    """blake3 of the template's name and of what it makes of a fixed exchange."""
    template = _template(name)
    turns = [{"from": "human", "value": f"Q\n{IMAGE_TOKEN}"}, {"from": "gpt", "value": "A"}]
    skeleton = [name, template.render(turns), template.render_prompt(turns[:1])]
    return blake3(json.dumps(skeleton).encode()).hexdigest()


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"template: unknown name {name!r}; known are {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]


def _turns(conversations: Any) -> list[Turn]:
    """The turns, checked, without a leading gpt turn: the original drops it too, for it answers nothing."""
    if conversations is None:
        raise BadSample("no conversations")
    if not isinstance(conversations, list | tuple):
        raise BadSample("conversations is not a list", type(conversations).__name__)
    for number, turn in enumerate(conversations, start=1):
        _check_turn(turn, number)
    turns = list(conversations)
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not turns:
        raise BadSample("empty conversations", f"{len(conversations)} turn(s), none of them human's")
    for number, turn in enumerate(turns):
        if turn["from"] != ROLES[number % 2]:
            order = ", ".join(turn["from"] for turn in conversations)
            raise BadSample("wrong role order", f"must be human, gpt, human, gpt, ...; found {order[:200]}")
    return turns


def _check_turn(turn: Any, number: int) -> None:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
        raise BadSample("malformed turn", f'turn {number} must be {{"from": role, "value": text}}')
    if turn["from"] not in ROLES:
        raise BadSample(
            "unknown role", f"turn {number} is from {str(turn['from'])[:50]!r}, must be human or gpt"
        )
    try:
        turn["value"].encode()
    except UnicodeEncodeError as error:
        raise BadSample("text is not valid Unicode", f"turn {number}, character {error.start}") from error


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """BOS, then the chunks around each image, each tokenised on its own, joined by -200 (as the original)."""
    ids: list[Any] = [tokenizer.bos_token_id]
    for number, chunk in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(tokenizer(chunk).input_ids[1:])
    return ids


def _images_first(text: str) -> str:
    """Move a turn's images to its front, a line each.

    One image: exactly the original. Of several the original keeps one; here all stay, in order.
    """
    num_images = text.count(IMAGE_TOKEN)
    if num_images == 0:
        return text
    rest = text.replace(IMAGE_TOKEN, "").strip()
    return (f"{IMAGE_TOKEN}\n" * num_images + rest).strip()


# plain: the images, then the caption. The question is dropped; there is no EOS.


def _render_plain(turns: Sequence[Turn]) -> str:
    if len(turns) != 2:
        raise BadSample(
            "not one question and one answer", f"template plain takes 2 turns, found {len(turns)}"
        )
    return _render_plain_prompt(turns) + _images_first(turns[1]["value"]) + "\n"


def _render_plain_prompt(turns: Sequence[Turn]) -> str:
    num_images = turns[0]["value"].count(IMAGE_TOKEN)
    if num_images == 0:
        raise BadSample("no <image> in the first turn", "template plain takes image samples only")
    return IMAGE_TOKEN * num_images


def _plain_labels(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # The images are all that stands before the caption, so they and BOS are what is masked.
    start = next(n for n, number in enumerate(ids[1:], start=1) if number != IMAGE_TOKEN_INDEX)
    return [
        IGNORE_INDEX if n < start or number == IMAGE_TOKEN_INDEX else number for n, number in enumerate(ids)
    ]


# v1: Vicuna's dialogue. Trained are the answers with their </s>.

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPEAKERS = {"human": "USER", "gpt": "ASSISTANT"}
SEPARATORS = {"human": " ", "gpt": "</s>"}
CALL_TO_ANSWER = " ASSISTANT: "


def _render_v1(turns: Sequence[Turn]) -> str:
    text = SYSTEM + " "
    for turn in turns:
        value = _images_first(turn["value"])
        # The original writes an empty turn without separator; `_v1_labels` then refuses the sample.
        text += (
            f"{SPEAKERS[turn['from']]}: {value}{SEPARATORS[turn['from']]}"
            if value
            else f"{SPEAKERS[turn['from']]}:"
        )
    return text


def _render_v1_prompt(turns: Sequence[Turn]) -> str:
    return _render_v1(turns) + "ASSISTANT:"


def _v1_labels(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The original's masking: count each round's tokens by tokenising it alone, then mask up to its answer.

    Where the counts do not add up to the whole, the original prints a warning and trains on nothing; here the
    sample is refused.
    """
    labels = [number if number != IMAGE_TOKEN_INDEX else IGNORE_INDEX for number in ids]
    labels[0] = IGNORE_INDEX
    position = 1
    for exchange in text.split("</s>"):
        parts = exchange.split(CALL_TO_ANSWER)
        if exchange == "" or len(parts) != 2:
            break
        # Minus BOS and the trailing space, a token here, but in the text a part of the answer's first.
        num_instruction = len(_ids(parts[0] + CALL_TO_ANSWER, tokenizer)) - 2
        labels[position : position + num_instruction] = [IGNORE_INDEX] * num_instruction
        # BOS is counted for the </s> that the split took away.
        position += len(_ids(exchange, tokenizer))
    # <unk> is also the padding: the original does not count it, and so loses the sample as well.
    if position != len(ids) or tokenizer.pad_token_id in ids:
        raise BadSample(
            "prompts and answers cannot be told apart",
            f"{position} of {len(ids)} tokens are accounted for; a turn is empty, or holds"
            f" '{CALL_TO_ANSWER.strip()}', '</s>' or '<unk>'",
        )
    return labels


TEMPLATES: dict[str, Template] = {
    "plain": Template(_render_plain, _render_plain_prompt, _plain_labels),
    "v1": Template(_render_v1, _render_v1_prompt, _v1_labels),
}
