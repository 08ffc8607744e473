"""Preparation of samples for a model, the same in both stages and in evaluation, and the digests of its rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config.config import Config, DataConfig
from pipeline.data.conversation import TokenizedSample, template_digest, tokenize
from pipeline.data.images import ImagePreprocessor
from pipeline.data.tokenizer import load_tokenizer, tokenizer_digest
from pipeline.errors import BadSample, building
from pipeline.models.checkpoint import checkpoint_folder
from pipeline.models.configuration import read_config
from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class Preparation:
    """A model's tokenizer and image preprocessing, with the config's template and limits."""

    tokenizer: Any
    preprocess: ImagePreprocessor
    template: str
    max_length: int
    num_vision_tokens: int

    @classmethod
    def of(cls, model: str, data: DataConfig) -> Preparation:
        """Return the preparation of a checkpoint (folder or hub id); opens no weights."""
        folder = checkpoint_folder(model)
        config = read_config(folder)
        image_size = config.tower.image_size
        assert isinstance(image_size, int)
        file = folder / "preprocessor_config.json"
        with building(f"{file}", then="use the tower's own file, or remove it for CLIP's"):
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
        """Return the fields of the fingerprint that stage 2 can compute without the teacher."""
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "template": template_digest(self.template),
            "image_preprocessing": self.preprocess.digest(),
        }

    def tokenize(self, conversations: list[dict[str, str]]) -> TokenizedSample:
        """Return ids and labels; raises `BadSample` if the template cannot express the sample or it is too long."""
        sample = tokenize(conversations, self.tokenizer, template=self.template)
        length = self.merged_length(sample.input_ids)
        if length > self.max_length:
            raise BadSample(
                "too long", f"{length} positions with vision tokens, data.max_length is {self.max_length}"
            )
        return sample

    def merged_length(self, input_ids: Sequence[int]) -> int:
        """Return the length S of a sample in which every image is N vision tokens."""
        return len(input_ids) + input_ids.count(IMAGE_TOKEN_INDEX) * (self.num_vision_tokens - 1)


def capture_settings(config: Config, *, dtype: str) -> dict[str, Any]:
    """Return the other settings that cached values depend on: stage 1 stores them, stage 2 compares them."""
    cached = config.targets.cached().items()
    targets = {name: settings.model_dump(mode="json", exclude={"source"}) for name, settings in cached}
    return {"targets": targets, "max_length": config.data.max_length, "dtype": dtype}


def pad_tokens(samples: Sequence[TokenizedSample]) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, int64 'B S', padded on the right."""
    return {
        "input_ids": pad_rows([sample.input_ids for sample in samples], 0),
        "attention_mask": pad_rows([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": pad_rows([sample.labels for sample in samples], IGNORE_INDEX),
    }


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return rows of different lengths as int64 'B S', padded with `value` on the right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
