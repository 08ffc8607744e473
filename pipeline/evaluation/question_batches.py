"""Batches of questions as a model reads them: prompts padded on the left, and the features of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.config import DataConfig
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.spans import SpanReader
from pipeline.distill.join.memory import TensorCache
from pipeline.evaluation.questions import Question
from pipeline.models.processors import Tensors
from pipeline.models.vlm import ImageFeatures, VisionLanguageModel

FEATURE_CACHE_BYTES = 256 * 2**20


class QuestionBatches:
    """What one model reads of questions. Features of the tower are held, where it can be split from the projector."""

    def __init__(self, vlm: VisionLanguageModel, preparation: Preparation, data: DataConfig):
        self.vlm, self.preparation = vlm, preparation
        self.held, self.read = TensorCache(FEATURE_CACHE_BYTES), SpanReader.of(data)

    def padded(self, questions: Sequence[Question]) -> dict[str, Any]:
        """Return the batch of `pad_tokens` on the model's device, padded on the left."""
        prompts = [question.unlabelled for question in questions]
        batch = pad_tokens(prompts, self.preparation.image_token_id, on_the_left=True)
        return {n: v.to(self.vlm.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}

    @torch.no_grad()
    def features(self, questions: Sequence[Question]) -> ImageFeatures | None:
        """Return the features of all images of a batch.

        The tower runs once for each distinct image, where it can be split from the projector.
        """
        places = [(q, number) for q in questions for number in range(len(q.image_digests))]
        sizes = [size for q in questions for size in q.sizes]
        if not places:
            return None
        if not self.vlm.splits_tower:
            return self.vlm.encode(self._pixels(places), sizes)
        images = {q.image_digests[number]: (q, number) for q, number in places}

        def compute(fresh: list[str]) -> torch.Tensor:
            return self.vlm.patch_features(self._pixels([images[digest] for digest in fresh]))

        patches = self.held.stack([q.image_digests[number] for q, number in places], compute)
        return self.vlm.encode((), sizes, patch_features=patches)

    def _pixels(self, wanted: Sequence[tuple[Question, int]]) -> list[Tensors]:
        fetched = self.read.holding((q.shard, q.image_spans[number]) for q, number in wanted)
        return [self.preparation.preprocess(q.read_image(number, fetched)) for q, number in wanted]
