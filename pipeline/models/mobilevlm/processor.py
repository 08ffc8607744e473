"""MobileVLM V2's processor: a chat template, the original's tokens, N image tokens an image, and CLIP's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from pipeline.errors import ConfigError
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.models.mobilevlm.configuration import IMAGE_TOKEN_ID, MobileVLMConfig, read_mobilevlm_config
from pipeline.models.mobilevlm.images import clip_processor, pixels_of
from pipeline.models.mobilevlm.tokenizer import load_tokenizer

IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The dialogue `v1` of the original code. A turn's images stand before its text, a line each. The original's `plain`
# drops the question and its labels are no turn's, so it is no chat template.
CHAT_TEMPLATE = (
    "{{ '" + SYSTEM.replace("'", "\\'") + " ' }}"
    "{%- for message in messages -%}"
    "{{ 'USER: ' if message.role == 'user' else 'ASSISTANT: ' }}"
    "{%- set parts = message.content -%}"
    "{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}"
    "{%- for part in parts if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in parts if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{{ ' ' if message.role == 'user' else '</s>' }}"
    "{%- endfor -%}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


class MobileVLMProcessor(ProcessorMixin):
    """Text and images to the inputs of `MobileVLMForCausalLM`."""

    attributes = ["image_processor", "tokenizer"]
    image_token = IMAGE_TOKEN
    image_token_id = IMAGE_TOKEN_ID

    def __init__(
        self, image_processor: Any, tokenizer: Any, *, num_vision_tokens: int, pads: bool = True
    ) -> None:
        # Not the base's, which would look for classes of these parts by name.
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.num_vision_tokens, self.pads = num_vision_tokens, pads
        self.chat_template = CHAT_TEMPLATE

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> MobileVLMProcessor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the processor of a checkpoint, a folder or hub id; the published ones have no file for it."""
        folder = checkpoint_folder(str(name))
        config = read_mobilevlm_config(folder)
        images = clip_processor(folder, config.tower.image_size)  # pyright: ignore[reportArgumentType]
        return cls(
            images,
            load_tokenizer(folder),
            num_vision_tokens=config.num_vision_tokens,
            pads=config.image_aspect_ratio == "pad",
        )

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] = (),
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `input_ids` and `attention_mask` 'B S', padded on the left, and `pixel_values` 'I C Y X'.

        Raises `ConfigError` if texts and images do not have the same number of images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures = [images] if isinstance(images, Image.Image) else list(images or ())
        if (named := sum(one.count(IMAGE_TOKEN) for one in texts)) != len(pictures):
            raise ConfigError(
                f"the texts name {named} images, {len(pictures)} are given; write <image> for each"
            )
        ids = [self.ids_of(one) for one in texts]
        longest = max(map(len, ids), default=0)
        padding = [[0] * (longest - len(row)) for row in ids]
        data: dict[str, Any] = {
            "input_ids": torch.tensor([[*pad, *row] for pad, row in zip(padding, ids, strict=True)]),
            "attention_mask": torch.tensor(
                [[*pad, *([1] * len(row))] for pad, row in zip(padding, ids, strict=True)]
            ),
        }
        if pictures:
            rgb = [picture.convert("RGB") for picture in pictures]
            data["pixel_values"] = torch.stack(
                [pixels_of(picture, self.image_processor, pads=self.pads) for picture in rgb]
            )
        return BatchFeature(data)

    def ids_of(self, text: str) -> list[int]:
        """Return the ids of a text with N image tokens for each image."""
        ids = token_ids(text, self.tokenizer)
        return [
            i
            for number in ids
            for i in [number] * (self.num_vision_tokens if number == IMAGE_TOKEN_ID else 1)
        ]


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """Return BOS, then the ids of the text around each image, joined by -200; tokenised separately, as originally."""
    ids: list[Any] = [tokenizer.bos_token_id]
    for number, chunk in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_TOKEN_ID)
        ids.extend(tokenizer(chunk, add_special_tokens=False).input_ids)
    return ids


AutoProcessor.register(MobileVLMConfig, MobileVLMProcessor)
