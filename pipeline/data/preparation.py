"""From a sample to what a model reads, the same in both stages and in evaluation; and the hashes of how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config.config import Config, DataConfig
from pipeline.data.conversation import (
    TokenizedSample,
    load_tokenizer,
    template_digest,
    tokenize,
    tokenizer_digest,
)
from pipeline.data.images import ImagePreprocessor
from pipeline.errors import BadSample, building
from pipeline.models.checkpoint import checkpoint_folder
from pipeline.models.configuration import read_config
from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Preparation:
    """A model's tokenizer and pixels, and the config's template: everything before the first matrix product."""

    tokenizer: Any
    preprocess: ImagePreprocessor
    template: str
    max_length: int
    num_vision_tokens: int

    @classmethod
    def of(cls, model: str, data: DataConfig) -> Preparation:
        """For a checkpoint folder or hub id; opens its config and tokenizer, none of its weights."""
        folder = checkpoint_folder(model)
        config = read_config(folder)
        image_size = config.tower.image_size
        assert isinstance(image_size, int)
        with building(f"{folder / PREPROCESSOR}", then="use the tower's own file, or remove it for CLIP's"):
            preprocess = ImagePreprocessor.from_pretrained(
                folder,
                aspect_ratio=data.image_aspect_ratio,
                image_size=image_size,
                max_pixels=data.max_image_pixels,
            )
        return cls(
            tokenizer=load_tokenizer(folder),
            preprocess=preprocess,
            template=data.template,
            max_length=data.max_length,
            num_vision_tokens=config.num_vision_tokens,
        )

    def digests(self) -> dict[str, str]:
        """The fingerprint's fields that stage 2 can compute without a teacher."""
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": template_digest(self.template),
            "image_preprocessing": self.preprocess.digest(),
        }

    def tokenize(self, conversations: list[dict[str, str]]) -> TokenizedSample:
        """Ids and labels; raises `BadSample` where the template cannot express it or it is too long."""
        sample = tokenize(conversations, self.tokenizer, template=self.template)
        length = self.merged_length(sample.input_ids)
        if length > self.max_length:
            raise BadSample(
                "too long", f"{length} positions with vision tokens, data.max_length is {self.max_length}"
            )
        return sample

    def merged_length(self, input_ids: Sequence[int]) -> int:
        """Positions of a sample once its placeholders are vision tokens."""
        return len(input_ids) + input_ids.count(IMAGE_TOKEN_INDEX) * (self.num_vision_tokens - 1)


def capture_settings(config: Config, *, dtype: str) -> dict[str, Any]:
    """Everything else that a cached value depends on: stage 1 writes it, stage 2 compares it."""
    cached = config.targets.cached().items()
    targets = {name: settings.model_dump(mode="json", exclude={"source"}) for name, settings in cached}
    return {"targets": targets, "max_length": config.data.max_length, "dtype": dtype}


def pad_tokens(samples: Sequence[TokenizedSample]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, int64 'B S', padded on the right."""
    return {
        "input_ids": pad_rows([sample.input_ids for sample in samples], 0),
        "attention_mask": pad_rows([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": pad_rows([sample.labels for sample in samples], IGNORE_INDEX),
    }


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one int64 'B S', filled up with `value` on the right."""
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
