"""Templates: how a conversation's turns become one text, and which of its tokens are trained.

`plain` and `v1` are the original code's, for MobileVLM; `chatml` is SmolLM2's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.errors import BadSample
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.models.mobilevlm.processor import IMAGE_TOKEN, SYSTEM, token_ids
from pipeline.positions import IGNORE_INDEX

Turn = dict[str, str]


@dataclass(frozen=True)
class Template:
    """A template's functions: turns to text, turns to a prompt, text and ids to labels.

    With `is_chatml` it needs SmolLM2's tokenizer, else LLaMA's.
    """

    render: Callable[[Sequence[Turn]], str]
    render_prompt: Callable[[Sequence[Turn]], str]
    labels: Callable[[str, list[int], PreTrainedTokenizerBase], list[int]]
    is_chatml: bool = False


def system_apart(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """Return the leading system turn, if there is one, and the other turns."""
    number = int(bool(turns) and turns[0]["from"] == "system")
    return list(turns[:number]), list(turns[number:])


def _images_first(text: str) -> str:
    """Move a turn's images to its front, a line each. Of several images the original keeps one; here all stay."""
    if not (num_images := text.count(IMAGE_TOKEN)):
        return text
    rest = text.replace(IMAGE_TOKEN, "").strip()
    return (f"{IMAGE_TOKEN}\n" * num_images + rest).strip()


# plain: the images, then the caption. The question is dropped, and there is no EOS.


def _render_plain(turns: Sequence[Turn]) -> str:
    if turns[0]["from"] == "system":
        raise BadSample("the template has no system turn", "template plain takes a question and an answer")
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
    # Only BOS and the images stand before the caption.
    return [IGNORE_INDEX, *(IGNORE_INDEX if number == IMAGE_TOKEN_ID else number for number in ids[1:])]


# v1: Vicuna's dialogue. The answers are trained, each with its </s>. A system turn
# takes the place of Vicuna's own text.

SPEAKERS = {"human": "USER", "gpt": "ASSISTANT"}
SEPARATORS = {"human": " ", "gpt": "</s>"}
CALL_TO_ANSWER = " ASSISTANT: "


def _render_v1(turns: Sequence[Turn]) -> str:
    system, turns = system_apart(turns)
    text = (system[0]["value"] if system else SYSTEM) + " "
    for turn in turns:
        value = _images_first(turn["value"])
        # The original writes an empty turn without a separator; `_v1_labels` then refuses the sample.
        text += f"{SPEAKERS[turn['from']]}:" + (f" {value}{SEPARATORS[turn['from']]}" if value else "")
    return text


def _render_v1_prompt(turns: Sequence[Turn]) -> str:
    return _render_v1(turns) + "ASSISTANT:"


def _v1_labels(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Mask as the original does: tokenise each exchange alone, count its tokens, and mask up to its answer.

    Where the counts do not add up, the original prints a warning and masks the whole sample; here it is refused.
    """
    labels = [number if number != IMAGE_TOKEN_ID else IGNORE_INDEX for number in ids]
    labels[0] = IGNORE_INDEX
    position = 1
    for exchange in text.split("</s>"):
        parts = exchange.split(CALL_TO_ANSWER)
        if exchange == "" or len(parts) != 2:
            break
        # Minus BOS and the trailing space: a token here, but part of the answer's first token in the text.
        num_instruction = len(token_ids(parts[0] + CALL_TO_ANSWER, tokenizer)) - 2
        labels[position : position + num_instruction] = [IGNORE_INDEX] * num_instruction
        # BOS counts for the </s> that the split removed.
        position += len(token_ids(exchange, tokenizer))
    # <unk> is also the padding, which the original does not count: it masks such a sample, too.
    if position != len(ids) or tokenizer.pad_token_id in ids:
        raise BadSample(
            "prompts and answers cannot be told apart",
            f"{position} of {len(ids)} tokens are accounted for; a turn is empty, or holds"
            f" '{CALL_TO_ANSWER.strip()}', '</s>' or '<unk>'",
        )
    return labels


# chatml: SmolLM2's dialogue, with a system turn where the data has one. The answers are trained, each with its
# <|im_end|>.

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHATML_ROLES = {"system": "system\n", "human": "user\n", "gpt": "assistant\n"}


def _render_chatml(turns: Sequence[Turn]) -> str:
    # The first <|im_start|> is the tokenizer's BOS, which `token_ids` adds.
    return f"\n{TURN_START}".join(_chatml_turn(turn) for turn in turns)


def _chatml_turn(turn: Turn) -> str:
    value = _images_first(turn["value"])
    if found := next((mark for mark in (TURN_START, TURN_END) if mark in value), None):
        raise BadSample("prompts and answers cannot be told apart", f"a turn holds {found!r}")
    return f"{CHATML_ROLES[turn['from']]}{value}{TURN_END}"


def _render_chatml_prompt(turns: Sequence[Turn]) -> str:
    return f"{_render_chatml(turns)}\n{TURN_START}{CHATML_ROLES['gpt']}"


def _chatml_labels(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Train every second span from BOS to EOS, an answer, without its header but with its EOS."""
    first_answer = 2 if text.startswith(CHATML_ROLES["system"]) else 1
    header = tokenizer(CHATML_ROLES["gpt"], add_special_tokens=False).input_ids
    labels = [IGNORE_INDEX] * len(ids)
    starts = [n for n, number in enumerate(ids) if number == tokenizer.bos_token_id]
    ends = [n for n, number in enumerate(ids) if number == tokenizer.eos_token_id]
    for start, end in zip(starts[first_answer::2], ends[first_answer::2], strict=True):
        first = start + 1 + len(header)
        if ids[start + 1 : first] != header:
            raise BadSample(
                "prompts and answers cannot be told apart", "an answer's first character joins its header"
            )
        labels[first : end + 1] = ids[first : end + 1]
    return labels


TEMPLATES: dict[str, Template] = {
    "plain": Template(_render_plain, _render_plain_prompt, _plain_labels),
    "v1": Template(_render_v1, _render_v1_prompt, _v1_labels),
    "chatml": Template(_render_chatml, _render_chatml_prompt, _chatml_labels, is_chatml=True),
}
