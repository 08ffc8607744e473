"""Pictures and prompts as the exported programs take them: every picture as a square of one size.

A program has inputs of fixed shape. The tensors that a processor makes depend on the picture's shape alone, so a
square of the tower's own size always fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.export.source import Source
from pipeline.models.configuration import image_token_of
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.models.mobilevlm.images import pad_to_square
from pipeline.models.mobilevlm.processor import MobileVLMProcessor
from pipeline.models.processors import OF_TEXT, load_processor

CLIP_MEAN = (122, 116, 104)  # LLaVA's padding: the mean colour of CLIP's images
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Prompt:
    """A question about a picture: ids 'S', which of them are vision tokens, and the tensors of the picture."""

    ids: Tensor
    is_vision: Tensor
    tensors: dict[str, Tensor]

    @property
    def pixels(self) -> Tensor:
        return self.tensors[PIXELS]

    @property
    def rest(self) -> dict[str, Tensor]:
        """What a family's forward reads of the picture beside its pixels: the same for every picture of this size."""
        return {name: tensor for name, tensor in self.tensors.items() if name != PIXELS}


class Inputs:
    """A checkpoint's processor, for pictures of `side` x `side` pixels."""

    def __init__(self, source: Source) -> None:
        self.side = side_of(source)
        self.image_token_id: int = image_token_of(source.config)
        self.processor: Any = (
            MobileVLMProcessor.from_pretrained(source.folder)
            if isinstance(source.config, MobileVLMConfig)
            else load_processor(source.folder)
        )

    def prompt(self, question: str, picture: Image.Image | None = None) -> Prompt:
        """Return a question about a picture, padded to a square and resized; about a black one without a picture."""
        square = pad_to_square(picture or Image.new("RGB", (self.side, self.side)), CLIP_MEAN)
        square = square.resize((self.side, self.side), Image.Resampling.BICUBIC)
        made = self.processor(text=[self.text_about(question)], images=[square], return_tensors="pt")
        [ids] = made["input_ids"]
        tensors = {name: value for name, value in made.items() if name not in OF_TEXT}
        return Prompt(ids, ids == self.image_token_id, tensors)

    def text_about(self, question: str) -> str:
        """Return the text of a dialogue up to the answer, with the marker of an image in it."""
        if not self.processor.chat_template:
            return f"{self.processor.image_token}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)


def side_of(source: Source) -> int:
    """Return the side of the tower's own pictures. Raises `ConfigError` for a tower without a size."""
    side = getattr(source.config.vision_config, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    if isinstance(side, int):
        return side
    raise ConfigError(
        f"{source.folder}: the vision tower of {source.config.model_type!r} has no size of its own (no image_size), "
        "a program takes pictures of one size; export another family, or use `export hf`"
    )


def embedded(embeddings: Tensor, is_vision: Tensor, vision: Tensor) -> Tensor:
    """Put vision tokens 'N D' in their places among the embeddings 'S D' of a prompt."""
    found, given = int(is_vision.sum()), len(vision)
    if found != given:
        raise ConfigError(
            f"the prompt has {found} places for vision tokens, the picture has {given} vision tokens"
        )
    return torch.where(is_vision[:, None], _spread(vision, is_vision), embeddings)


def _spread(vision: Tensor, is_vision: Tensor) -> Tensor:
    """Repeat rows 'N D' so that each stands at its place: 'S D'; those elsewhere mean nothing."""
    return vision[(is_vision.cumsum(0) - 1).clamp(min=0)]
