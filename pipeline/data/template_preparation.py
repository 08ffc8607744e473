"""Preparation for MobileVLM V2, by the original code's templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from pipeline.data.conversation import TokenizedSample, template_digest, tokenize, tokenize_prompt
from pipeline.data.decoding import ImageSize
from pipeline.data.images import ImagePreprocessor
from pipeline.data.preparation import Preparation
from pipeline.data.templates import Turn
from pipeline.data.tokenizer_digest import tokenizer_digest
from pipeline.errors import building
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMConfig
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.models.processors import Tensors
from pipeline.positions import IGNORE_INDEX


@dataclass(frozen=True)
class TemplatePreparation(Preparation):
    """MobileVLM V2's tokenizer and image preprocessing; every image has `num_vision_tokens`."""

    needs_image_sizes: ClassVar[bool] = False

    images: ImagePreprocessor
    num_vision_tokens: int

    @classmethod
    def of(cls, folder: Path, config: MobileVLMConfig, data: Any) -> TemplatePreparation:
        """Return the preparation of a checkpoint's folder; opens no weights."""
        size: Any = config.tower.image_size
        file = folder / "preprocessor_config.json"
        with building(f"{file}", then="use the tower's own file, or remove it for CLIP's"):
            images = ImagePreprocessor.from_pretrained(
                folder,
                aspect_ratio=data.image_aspect_ratio,
                image_size=size,
                max_pixels=data.max_image_pixels,
            )
        return cls.with_images(
            images, data, tokenizer=load_tokenizer(folder), num_vision_tokens=config.num_vision_tokens
        )

    @classmethod
    def with_images(
        cls, images: ImagePreprocessor, data: Any, *, tokenizer: Any, num_vision_tokens: int
    ) -> TemplatePreparation:
        """Return a preparation that reads these images; without a tokenizer it reads no text."""
        return cls(
            tokenizer=tokenizer,
            template=data.template,
            max_length=data.max_length,
            max_pixels=data.max_image_pixels,
            image_token_id=IMAGE_TOKEN_ID,
            family=MobileVLMConfig.model_type,
            images=images,
            num_vision_tokens=num_vision_tokens,
        )

    def digests(self) -> dict[str, str]:
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": template_digest(self.template),
            "image_preprocessing": self.images.digest(),
        }

    def preprocess(self, data: bytes) -> Tensors:
        return {"pixel_values": self.images(data)[None]}

    def vision_tokens(self, size: ImageSize) -> int:
        return self.num_vision_tokens

    def picture(self, data: bytes) -> Image.Image:
        return self.images.picture(data)

    def prompt(self, conversations: Sequence[Turn], images: Sequence[ImageSize]) -> TokenizedSample:
        ids = tokenize_prompt(conversations, self.tokenizer, template=self.template)
        return self.expanded(ids, [IGNORE_INDEX] * len(ids))

    def _tokenized(self, conversations: Any, images: Sequence[ImageSize]) -> TokenizedSample:
        sample = tokenize(conversations, self.tokenizer, template=self.template)
        return self.expanded(sample.input_ids, sample.labels)

    def expanded(self, input_ids: Iterable[int], labels: Iterable[int]) -> TokenizedSample:
        """Return ids and labels with N image tokens in the place of each one."""
        return expanded(input_ids, labels, self.num_vision_tokens)


def expanded(input_ids: Iterable[int], labels: Iterable[int], num_vision_tokens: int) -> TokenizedSample:
    """Return ids and labels of MobileVLM V2 with N image tokens in the place of each one."""
    widths = [(number, label, num_vision_tokens if number == IMAGE_TOKEN_ID else 1)
              for number, label in zip(input_ids, labels, strict=True)]  # fmt: skip
    side = round(num_vision_tokens**0.5)
    num_images = sum(number == IMAGE_TOKEN_ID for number, _, _ in widths)
    return TokenizedSample(
        tuple(number for number, _, width in widths for _ in range(width)),
        tuple(label for _, label, width in widths for _ in range(width)),
        (num_vision_tokens,) * num_images,
        ((side, side),) * num_images,
    )
