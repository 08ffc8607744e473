"""The questions of test sets, read from their shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from cache import Span
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import Preparation
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Rejected, read_shard
from pipeline.data.spans import ReadSpan, check_ranges, read_span
from pipeline.errors import BadSample, ShardError
from pipeline.evaluation.predictions import NO_TYPE, Prediction
from pipeline.evaluation.references import Reference, reference_after
from pipeline.positions import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Question:
    """A sample's last turn as a prompt: where its images lie, and not their bytes, since there may be many."""

    unanswered: Prediction
    prompt: NDArray[np.int32]
    reference: Reference
    sizes: tuple[int, ...]  # vision tokens of each image
    shard: str
    image_digests: tuple[str, ...]
    image_spans: tuple[Span, ...]

    @property
    def unlabelled(self) -> TokenizedSample:
        """The prompt as a sample without labels."""
        return TokenizedSample(tuple(self.prompt.tolist()), (IGNORE_INDEX,) * len(self.prompt), self.sizes)

    def read_image(self, number: int, read: ReadSpan = read_span) -> bytes:
        """Return the bytes of an image. Raises `ShardError` if the shard changed since the question was read."""
        data, span = read(self.shard, self.image_spans[number]), self.image_spans[number]
        if blake3(data).hexdigest() != self.image_digests[number]:
            raise ShardError(f"{self.shard}: {span.file} changed while it was evaluated; evaluate again.")
        return data


def read_questions(
    settings: EvaluateConfig, preparation: Preparation, data: DataConfig
) -> Iterator[Question]:
    """Yield every question of every test set, shard by shard."""
    shards = [(name, shard) for name, given in settings.test_sets().items() for shard in expand_shards(given)]
    check_ranges([shard for _, shard in shards])
    for test_set, shard in shards:
        for item in read_shard(shard, max_pixels=data.max_image_pixels):
            if isinstance(item, Rejected):
                raise BadSample("a test sample cannot be asked", f"{item.key!r} of {shard}: {item.reason}")
            unanswered = Prediction(
                key=item.key,
                group=item.image_digests[0] if item.image_digests else item.key,
                question_type=str(item.metadata.get("question_type", NO_TYPE)),
                answer=item.conversations[-1]["value"],
                prediction="",
                test_set=test_set,
            )
            sizes = preparation.sizes_of(item.images)
            prompt = preparation.prompt(item.conversations, sizes)
            ids = np.array(prompt.input_ids, dtype=np.int32)
            reference = reference_after(prompt, item.conversations, sizes, preparation)
            places = (shard, item.image_digests, item.image_spans)
            yield Question(unanswered, ids, reference, prompt.sizes, *places)
