"""Preparation of samples for a model, the same in both stages and in evaluation, and the digests of its rules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample
from pipeline.data.decoding import ImageSize, image_size
from pipeline.data.templates import Turn
from pipeline.errors import BadSample
from pipeline.models.processors import Tensors
from pipeline.positions import IGNORE_INDEX


@dataclass(frozen=True)
class Preparation(ABC):
    """A model's processor with the config's template and limits: samples to ids, labels and pixel inputs."""

    # Whether an image's size decides how many vision tokens it has.
    needs_image_sizes: ClassVar[bool] = True

    tokenizer: Any
    template: str
    max_length: int
    max_pixels: int
    image_token_id: int
    family: str

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Return the fields of the fingerprint that stage 2 can compute without the teacher."""

    @abstractmethod
    def preprocess(self, data: bytes) -> Tensors:
        """Return the pixel inputs of one image; raises `BadSample` for bytes that are no usable image."""

    @abstractmethod
    def picture(self, data: bytes) -> Image.Image:
        """Return what the model sees of an image, for people."""

    @abstractmethod
    def prompt(self, conversations: Sequence[Turn], images: Sequence[ImageSize]) -> TokenizedSample:
        """Return the ids from which the last answer is to be generated, without labels."""

    @abstractmethod
    def _tokenized(self, conversations: Any, images: Sequence[ImageSize]) -> TokenizedSample: ...

    @abstractmethod
    def vision_tokens(self, size: ImageSize) -> int:
        """Return how many vision tokens an image of this size has."""

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer."""
        return [self.tokenizer.eos_token_id]

    @property
    def pad_id(self) -> int:
        """The id of padding in what is generated; decoding leaves it out."""
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else pad

    def tokenize(self, conversations: Any, images: Sequence[ImageSize] = ()) -> TokenizedSample:
        """Return ids and labels of a conversation whose images have these sizes (see `sizes_of`).

        Raises `BadSample` if the template cannot express the sample or it is too long.
        """
        sample = self._tokenized(conversations, images)
        if (length := len(sample.input_ids)) > self.max_length:
            raise BadSample(
                "too long", f"{length} positions with vision tokens, data.max_length is {self.max_length}"
            )
        return sample

    def sizes_of(self, images: Sequence[bytes | Callable[[], bytes]]) -> list[ImageSize]:
        """Return the sizes in pixels of image files, if they matter; else nothing is read."""
        if not self.needs_image_sizes:
            return [(0, 0)] * len(images)
        read = (data if isinstance(data, bytes) else data() for data in images)
        return [image_size(data, max_pixels=self.max_pixels) for data in read]


def capture_settings(config: Config, *, dtype: str) -> dict[str, Any]:
    """Return the other settings that cached values depend on: stage 1 stores them, stage 2 compares them."""
    cached = config.targets.cached().items()
    targets = {name: settings.model_dump(mode="json", exclude={"source"}) for name, settings in cached}
    return {"targets": targets, "max_length": config.data.max_length, "dtype": dtype}


def pad_tokens(
    samples: Sequence[TokenizedSample], image_token_id: int, *, on_the_left: bool = False
) -> dict[str, Any]:
    """Return a batch: `input_ids`, `attention_mask`, `labels` int64 'B S', `is_vision` bool 'B S', and `sizes`.

    `sizes` are the numbers of vision tokens of each sample's images. Padding has the id 0 and is masked.
    """
    rows = [(sample.input_ids, [1] * len(sample.input_ids), sample.labels) for sample in samples]
    side = "left" if on_the_left else "right"
    ids, mask, labels = (
        _pad(part, value, side)
        for part, value in zip(zip(*rows, strict=True), (0, 0, IGNORE_INDEX), strict=True)
    )
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "is_vision": ids == image_token_id,
        "sizes": [sample.sizes for sample in samples],
    }


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """Return rows of different lengths as int64 'B S'."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
