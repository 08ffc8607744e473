"""Greedy answers to held-out conversations, and the log probability of the reference answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from transformers import GenerationConfig

from cache import Span
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.config.provenance import replace_text
from pipeline.data.conversation import TokenizedSample
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Rejected, read_shard
from pipeline.data.spans import ReadSpan, check_ranges, read_span
from pipeline.errors import BadSample, PipelineError, ShardError, building
from pipeline.evaluation.question_batches import QuestionBatches
from pipeline.evaluation.references import Reference, reference_after, reference_log_probs
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.progress import Progress

PREDICTIONS_FILE = "predictions.jsonl"
NO_TYPE = "all questions"  # the type of questions that have none


@dataclass(frozen=True)
class Prediction:
    """The answer to one question of a test set; `group` is shared by the questions of one image (bootstrap).

    `log_prob` is that of the reference `answer`, summed over its `num_tokens`, the end mark included; None with 0
    tokens where the template cannot express it. `num_tokens` is None in files of earlier versions.
    """

    key: str
    group: str
    question_type: str
    answer: str
    prediction: str
    test_set: str = "test"
    # In another batch they are rounded otherwise.
    log_prob: float | None = field(default=None, compare=False)
    num_tokens: int | None = None

    @property
    def is_scored(self) -> bool:
        return self.num_tokens is not None

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.prediction.strip()


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


def evaluate_model(
    model: str,
    data: DataConfig,
    settings: EvaluateConfig,
    *,
    output: Path,
    description: str = "evaluate",
    device: torch.device | None = None,
) -> list[Prediction]:
    """Answer every held-out question with a checkpoint and write the predictions to `output` (JSON lines).

    The last human turn of each conversation is asked, given the turns before it. `device` is a GPU by default, if
    there is one. Raises `BadSample` for a sample that cannot be asked: an accuracy over an unknown part of the test
    set would mean nothing.
    """
    preparation = load_preparation(model, data)
    network = load_network(model, dtype=settings.dtype).eval()
    with building(f"model {model} on a GPU", then="set evaluate.dtype to bfloat16"):
        network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Replaces the checkpoint's own, from which transformers takes whatever a call does not name.
    network.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=preparation.pad_id,
        eos_token_id=preparation.stop_ids,
    )
    vlm = VisionLanguageModel(network)
    questions = sorted(read_questions(settings, preparation, data), key=lambda q: len(q.prompt))
    batches = QuestionBatches(vlm, preparation, data)
    predictions: list[Prediction] = []
    with Progress(description, unit="questions", doing="asking") as progress:
        for start in range(0, len(questions), settings.batch_size):
            progress(start, len(questions))
            batch = questions[start : start + settings.batch_size]
            predictions += _answer(batches, batch)
        progress(len(questions), len(questions))
    predictions.sort(key=lambda prediction: (prediction.test_set, prediction.key))
    output.parent.mkdir(parents=True, exist_ok=True)
    # All of them or none: who reads the file may not know how many there should be.
    replace_text(output, "".join(json.dumps(asdict(p) | {"correct": p.correct}) + "\n" for p in predictions))
    return predictions


def read_predictions(file: Path) -> list[Prediction]:
    """Read what `evaluate_model` wrote. Raises `PipelineError` naming the file if it is anything else."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [Prediction(**{k: v for k, v in row.items() if k != "correct"}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{file} is damaged: not every line is a prediction; remove it and evaluate again"
        ) from error


def by_test_set(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Return the predictions of each test set, in their order."""
    sets: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        sets.setdefault(prediction.test_set, []).append(prediction)
    return sets


def accuracy_by_type(predictions: Sequence[Prediction]) -> dict[str, tuple[float, int]]:
    """Return question type -> (share correct, questions), types by name, 'all' last."""
    types = sorted({p.question_type for p in predictions})
    groups = {t: [p.correct for p in predictions if p.question_type == t] for t in types}
    groups["all"] = [p.correct for p in predictions]
    return {name: (sum(correct) / len(correct), len(correct)) for name, correct in groups.items()}


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


def _answer(batches: QuestionBatches, questions: Sequence[Question]) -> list[Prediction]:
    """Greedy answers to a batch, prompts padded on the left, so that each is followed by its answer."""
    vlm, preparation = batches.vlm, batches.preparation
    prompts = [q.unlabelled for q in questions]
    images = batches.features(questions)
    generated = vlm.generate(
        batches.padded(questions), images, generation_config=vlm.network.generation_config
    )
    texts = preparation.tokenizer.batch_decode(generated, skip_special_tokens=True)
    log_probs = reference_log_probs(
        vlm, prompts, [q.reference for q in questions], images, preparation.image_token_id
    )
    return [
        replace(q.unanswered, prediction=text, log_prob=log_prob, num_tokens=q.reference.num_tokens)
        for q, text, log_prob in zip(questions, texts, log_probs, strict=True)
    ]
