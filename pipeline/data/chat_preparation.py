"""Preparation by a checkpoint's own processor and chat template, for every family but MobileVLM V2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3
from cachetools import LRUCache
from jinja2 import TemplateError
from PIL import Image

from pipeline.data.conversation import TokenizedSample, answered_turns, checked_turns
from pipeline.data.decoding import DECODING_RULES, ImageSize, decode_image
from pipeline.data.expansions import Expansion, grid_of, refusing, spans_in
from pipeline.data.preparation import Preparation
from pipeline.data.templates import IMAGE_TOKEN, Turn
from pipeline.data.tokenizer_digest import tokenizer_digest
from pipeline.errors import BadSample, ConfigError, building, reason_of
from pipeline.models.configuration import image_token_of
from pipeline.models.families import FAMILIES, Family
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.processors import Tensors, expansion_of, expansion_of_size, load_processor
from pipeline.positions import IGNORE_INDEX

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
CANNOT_TELL = "prompts and answers cannot be told apart"
KNOWN_SIZES = 4096  # of images whose expansion is held; each is a text of a few kilobytes
PROBED_SIZES = ((32, 32), (640, 480), (300, 900))
# Of an image processor's settings: its names, which differ between releases and backends and change no pixel.
ONLY_NAMES = (
    "image_processor_type",
    "processor_class",
    "feature_extractor_type",
    "_name_or_path",
    "transformers_version",
)
SHOWN = 60  # characters of the text that stands for an image


@dataclass(frozen=True)
class ChatPreparation(Preparation):
    """A processor with its chat template. Turns become one text, whose images are expanded as the processor does.

    Labels are found by prefixes: the text up to an answer, with the template's call to answer, must be the beginning
    of the text with the answer.
    """

    processor: Any
    generation_stops: tuple[int, ...] = ()
    expansions: LRUCache[ImageSize, Expansion] = field(
        default_factory=lambda: LRUCache(KNOWN_SIZES), compare=False
    )

    @classmethod
    def of(cls, folder: Path, config: Any, data: Any) -> ChatPreparation:
        """Return the preparation of a checkpoint's folder; opens no weights."""
        if data.template != "chat":
            raise ConfigError(
                f"data.template: {data.template!r} is MobileVLM V2's, but {folder} is of the family "
                f"{config.model_type!r}; set data.template: chat to use the checkpoint's own chat template"
            )
        processor = load_processor(folder)
        made = cls(
            tokenizer=processor.tokenizer,
            template="chat",
            max_length=data.max_length,
            max_pixels=data.max_image_pixels,
            image_token_id=image_token_of(config),
            processor=processor,
            family=config.model_type,
            generation_stops=_stops(folder),
        )
        if made.chat_template is None:
            raise ConfigError(
                f"{folder}: no chat template (chat_template.jinja, or the field chat_template of "
                "processor_config.json or tokenizer_config.json); add the one the model was trained with"
            )
        made.try_out(folder)
        return made

    def try_out(self, folder: Path) -> None:
        """Raise `ConfigError` if the processor cannot prepare an image: its files may be another model's."""
        then = "use the tokenizer and processor files that belong to its config.json"
        with building(f"{folder}: the processor cannot prepare an image", then=then):
            self._expansion(PROBED_SIZES[0])

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns messages into one text."""
        own = getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        return own or FAMILIES.get(self.family, Family()).chat_template

    @property
    def stop_ids(self) -> list[int]:
        return sorted({self.tokenizer.eos_token_id, *self.generation_stops} - {None})

    def digests(self) -> dict[str, str]:
        settings = self.processor.image_processor.to_dict()
        images = {
            "decoding": DECODING_RULES,
            "settings": {name: value for name, value in settings.items() if name not in ONLY_NAMES},
            "expansions": [self._expansion(size).text for size in PROBED_SIZES],
        }
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": _digest(["chat", self.chat_template]),
            "image_preprocessing": _digest(images),
        }

    def preprocess(self, data: bytes) -> Tensors:
        image = decode_image(data, max_pixels=self.max_pixels)
        with refusing(image.size):
            return expansion_of(self.processor, image)[1]

    def vision_tokens(self, size: ImageSize) -> int:
        return self._expansion(size).size

    def picture(self, data: bytes) -> Image.Image:
        return decode_image(data, max_pixels=self.max_pixels)

    def prompt(self, conversations: Sequence[Turn], images: Sequence[ImageSize]) -> TokenizedSample:
        turns = checked_turns(conversations)
        if turns[-1]["from"] == "gpt":
            turns = turns[:-1]
        text, _, expansions = self._expand(self._render(turns, calls_to_answer=True), images)
        ids, _ = self._encoded(text)
        return self._sample(ids, [IGNORE_INDEX] * len(ids), expansions)

    def _tokenized(self, conversations: Any, images: Sequence[ImageSize]) -> TokenizedSample:
        turns = answered_turns(conversations)
        whole = self._render(turns)
        if end := self._missing_end(whole):
            whole = whole.rstrip() + end
        text, place, expansions = self._expand(whole, images)
        ids, ends = self._encoded(text)
        spans = spans_in(text, expansions)  # an answer may hold images, but no model writes them
        labels = [IGNORE_INDEX] * len(ids)
        for number in (n for n, turn in enumerate(turns) if turn["from"] == "gpt"):
            start, stop = self._answer(turns, number, whole)
            before, _ = self._encoded(text[: place(start)])
            if ids[: len(before)] != before:
                raise BadSample(
                    CANNOT_TELL, f"the first characters of answer {(number + 1) // 2} join its header"
                )
            within = (at for at in range(len(before), len(ids)) if ends[at] <= place(stop))
            for at in within:
                if not any(ends[at] in span for span in spans):
                    labels[at] = ids[at]
        return self._sample(ids, labels, expansions)

    def _answer(self, turns: Sequence[Turn], number: int, whole: str) -> tuple[int, int]:
        """Return where the answer with this number lies in the whole text, its end mark included."""
        before = self._render(turns[:number], calls_to_answer=True)
        until = self._render(turns[: number + 1]) if number + 1 < len(turns) else whole
        until = until.rstrip()  # what follows an end mark, such as a line break, is no answer
        if not until.startswith(before) or not whole.startswith(until):
            raise BadSample(CANNOT_TELL, "the chat template writes a turn in another way once others follow")
        return len(before), len(until)

    def _sample(
        self, ids: Sequence[int], labels: Sequence[int], expansions: Sequence[Expansion]
    ) -> TokenizedSample:
        sizes = tuple(one.size for one in expansions)
        if (found := sum(number == self.image_token_id for number in ids)) != sum(sizes):
            raise BadSample(
                "number of image tokens differs",
                f"the text has {found}, its {len(sizes)} images have {sum(sizes)}",
            )
        return TokenizedSample(tuple(ids), tuple(labels), sizes, tuple(one.grid for one in expansions))

    # Text

    def _render(self, turns: Sequence[Turn], *, calls_to_answer: bool = False) -> str:
        """Return the chat template's text of some turns, a placeholder for each image."""
        messages = [{"role": ROLES[turn["from"]], "content": self._content(turn["value"])} for turn in turns]
        try:
            text = self.processor.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=calls_to_answer,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise BadSample("the chat template refuses the conversation", reason_of(error)) from error
        if turns[0]["from"] == "system" and turns[0]["value"].strip() not in text:
            raise BadSample("the template has no system turn", "the chat template drops its text")
        return text

    def _content(self, value: str) -> list[dict[str, str]]:
        """Return a turn's value as text and image parts. A newline beside <image> belongs to LLaVA's form of it."""
        if found := self._mark_in(value):
            raise BadSample(CANNOT_TELL, f"a turn holds {found!r}")
        parts: list[dict[str, str]] = []
        for number, text in enumerate(value.split(IMAGE_TOKEN)):
            if number:
                parts.append({"type": "image"})
            if text := (text.strip("\n") if IMAGE_TOKEN in value else text):
                parts.append({"type": "text", "text": text})
        return parts or [{"type": "text", "text": ""}]

    def _mark_in(self, value: str) -> str | None:
        """Return a special token that stands in a text, such as the end of a turn."""
        # A vocabulary may have thousands, but they begin with few characters, which most texts do not have.
        rest = value.replace(IMAGE_TOKEN, "")
        if not any(mark[0] in rest for mark in self._first_of_each):
            return None
        return next((mark for mark in self._marks if mark in rest), None)

    @cached_property
    def _marks(self) -> list[str]:
        """The special tokens, which no turn may hold; <image> is the data's own mark of an image."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*self.tokenizer.all_special_tokens, *added} - {IMAGE_TOKEN})

    @cached_property
    def _first_of_each(self) -> list[str]:
        """One special token for each first character."""
        return list({mark[0]: mark for mark in self._marks}.values())

    def _missing_end(self, text: str) -> str:
        """Return the end-of-text token where the template does not end an answer: without it none learns to stop."""
        ends = text.rstrip().endswith(tuple(self._marks))
        return "" if ends else self.tokenizer.eos_token

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids, and where each ends in the text; without what a tokenizer adds at the end of every text."""
        bos = self.tokenizer.bos_token
        adds = not (bos is not None and text.startswith(bos))  # transformers' rule for chat templates
        encoded = self.tokenizer(text, add_special_tokens=adds, return_offsets_mapping=True)
        length = len(encoded["input_ids"]) - (self._num_added_at_the_end if adds else 0)
        return encoded["input_ids"][:length], [end for _, end in encoded["offset_mapping"][:length]]

    @cached_property
    def _num_added_at_the_end(self) -> int:
        added = self.tokenizer("")["input_ids"]
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return int(added[-1:] == [last] and first != last)

    # Images

    def _expand(self, text: str, images: Sequence[ImageSize]) -> tuple[str, Any, list[Expansion]]:
        """Put each image's expansion in the place of its placeholder.

        Also return a function from positions in `text` to positions in the result, and the expansions in order.
        """
        placeholder = self.processor.image_token
        pieces = text.split(placeholder)
        if len(pieces) - 1 != len(images):
            raise BadSample(
                "number of images differs",
                f"the chat template writes {len(pieces) - 1}, the sample has {len(images)}",
            )
        expansions = [self._expansion(size) for size in images]
        made, starts, grown = pieces[0], [], []
        for expansion, piece in zip(expansions, pieces[1:], strict=True):
            starts.append(len(made) - sum(grown))
            grown.append(len(expansion.text) - len(placeholder))
            made += expansion.text + piece

        def place(position: int) -> int:
            return position + sum(by for start, by in zip(starts, grown, strict=True) if start < position)

        return made, place, expansions

    def _expansion(self, size: ImageSize) -> Expansion:
        """Return what the processor writes for an image of this size: it looks at the size alone."""
        if size not in self.expansions:
            with refusing(size):
                text, pixels = expansion_of_size(self.processor, size)
            number = self.tokenizer(text, add_special_tokens=False)["input_ids"].count(self.image_token_id)
            if number == 0:
                raise ConfigError(
                    f"the processor writes {text[:SHOWN]!r} for an image, but among its tokens is no "
                    f"{self.image_token_id}, the image_token_id of config.json; use the tokenizer and processor "
                    "files that belong to the checkpoint"
                )
            self.expansions[size] = Expansion(text, number, grid_of(number, pixels))
        return self.expansions[size]


def _stops(folder: Path) -> tuple[int, ...]:
    """Return the ids that end an answer by the checkpoint's generation_config.json."""
    file = folder / "generation_config.json"
    found = None
    if file.is_file():
        with named_if_broken(file, kind="a generation config"):
            found = json.loads(file.read_text()).get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _digest(value: object) -> str:
    return blake3(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
