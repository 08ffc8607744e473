"""Exact-match accuracy: greedy answers to held-out conversations, compared word for word, by question type."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import GenerationConfig

from cache import Span
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.data.conversation import tokenize_prompt
from pipeline.data.preparation import Preparation, pad_rows
from pipeline.data.shards import Rejected, expand_shards, read_shard, read_span
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import BadSample, PipelineError, ShardError, building, writing
from pipeline.models.mobilevlm import MobileVLMForCausalLM

PREDICTIONS_FILE = "predictions.jsonl"
FEATURE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prediction:
    """One question of a test set answered. `group` is what questions of one image share, for the bootstrap."""

    key: str
    group: str
    question_type: str
    answer: str
    prediction: str
    test_set: str = "test"

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.prediction.strip()


@dataclass(frozen=True, slots=True)
class Question:
    """A sample's last turn as a prompt. Where its images lie is held, and not their bytes: there may be very many."""

    test_set: str
    shard: str
    key: str
    question_type: str
    prompt: NDArray[np.int32]
    answer: str
    image_digests: tuple[str, ...]
    image_spans: tuple[Span, ...]

    @property
    def group(self) -> str:
        """What questions of one image share."""
        return self.image_digests[0] if self.image_digests else self.key

    def read_image(self, number: int) -> bytes:
        """The bytes of one of its images. Raises `ShardError` if the shard changed since the question was read."""
        data, span = read_span(self.shard, self.image_spans[number]), self.image_spans[number]
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
    """Answer every held-out question with a checkpoint; predictions are kept in `output` (JSON lines).

    `device` is by default a GPU if there is one.
    The last human turn of each conversation is asked, given the turns before it. A sample that cannot be asked
    raises: an accuracy over an unknown part of the test set is no accuracy.
    """
    preparation = Preparation.of(model, data)
    network = MobileVLMForCausalLM.from_pretrained(model, dtype=settings.dtype).eval()
    with building(f"model {model} on a GPU", then="set evaluate.dtype to bfloat16"):
        network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network.generation_config = _greedy(preparation, settings.max_new_tokens)
    questions = sorted(questions_of(settings, preparation, data), key=lambda q: len(q.prompt))
    features = TensorCache(FEATURE_CACHE_BYTES)
    predictions: list[Prediction] = []
    for start in tqdm(range(0, len(questions), settings.batch_size), desc=description, unit="batch"):
        batch = questions[start : start + settings.batch_size]
        predictions += _answer(network, preparation, batch, features)
    predictions.sort(key=lambda prediction: (prediction.test_set, prediction.key))
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.{os.getpid()}")
    with writing(output):
        unfinished.write_text(
            "".join(json.dumps(asdict(p) | {"correct": p.correct}) + "\n" for p in predictions)
        )
    unfinished.replace(
        output
    )  # all of them or none: who reads the file may not know how many there should be
    return predictions


def read_predictions(file: Path) -> list[Prediction]:
    """What `evaluate_model` wrote. Raises `PipelineError` naming the file if it is anything else."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [Prediction(**{k: v for k, v in row.items() if k != "correct"}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{file} is damaged: not every line is a prediction; remove it and evaluate again"
        ) from error


def by_test_set(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions of each test set, in order of name."""
    sets: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        sets.setdefault(prediction.test_set, []).append(prediction)
    return sets


def accuracy_by_type(predictions: Sequence[Prediction]) -> dict[str, tuple[float, int]]:
    """Question type -> (share correct, questions), types by name; 'all' last."""
    types = sorted({p.question_type for p in predictions})
    groups = {t: [p.correct for p in predictions if p.question_type == t] for t in types}
    groups["all"] = [p.correct for p in predictions]
    return {name: (sum(correct) / len(correct), len(correct)) for name, correct in groups.items()}


def questions_of(settings: EvaluateConfig, preparation: Preparation, data: DataConfig) -> Iterator[Question]:
    """Every question of every test set, shard by shard."""
    for test_set, shards in settings.test_sets().items():
        for shard in expand_shards(shards):
            yield from _questions_of_shard(test_set, shard, preparation, data)


def _questions_of_shard(
    test_set: str, shard: str, preparation: Preparation, data: DataConfig
) -> Iterator[Question]:
    for item in read_shard(shard, max_pixels=data.max_image_pixels):
        if isinstance(item, Rejected):
            raise BadSample("a test sample cannot be asked", f"{item.key!r} of {shard}: {item.reason}")
        prompt = tokenize_prompt(item.conversations, preparation.tokenizer, template=preparation.template)
        yield Question(
            test_set=test_set,
            shard=shard,
            key=item.key,
            question_type=str(item.metadata.get("question_type", "all questions")),
            prompt=np.array(prompt, dtype=np.int32),
            answer=item.conversations[-1]["value"],
            image_digests=item.image_digests,
            image_spans=item.image_spans,
        )


def _greedy(preparation: Preparation, max_new_tokens: int) -> GenerationConfig:
    """In place of the checkpoint's own: transformers would take from that whatever a call does not name."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=preparation.tokenizer.pad_token_id,
        eos_token_id=preparation.tokenizer.eos_token_id,
    )


def _answer(
    network: MobileVLMForCausalLM,
    preparation: Preparation,
    questions: Sequence[Question],
    features: TensorCache,
) -> list[Prediction]:
    """Greedy answers to a batch, prompts padded on the right (the model moves the padding to the left)."""
    mask = pad_rows([[1] * len(question.prompt) for question in questions], 0)
    generated = network.generate(
        pad_rows([question.prompt.tolist() for question in questions], 0).to(network.device),
        patch_features=_patch_features(network, preparation, questions, features),
        attention_mask=mask.to(network.device),
        generation_config=network.generation_config,
    )
    texts = preparation.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [
        Prediction(
            key=question.key,
            group=question.group,
            question_type=question.question_type,
            answer=question.answer,
            prediction=text,
            test_set=question.test_set,
        )
        for question, text in zip(questions, texts, strict=True)
    ]


def _patch_features(
    network: MobileVLMForCausalLM,
    preparation: Preparation,
    questions: Sequence[Question],
    features: TensorCache,
) -> torch.Tensor | None:
    """The frozen tower's features 'I M W' of all images of the batch, each distinct image computed once."""
    images = {digest: (q, number) for q in questions for number, digest in enumerate(q.image_digests)}
    if not images:
        return None

    def compute(fresh: list[str]) -> torch.Tensor:
        wanted = [images[digest] for digest in fresh]
        pixels = torch.stack([preparation.preprocess(q.read_image(number)) for q, number in wanted])
        return network.encode_patches(pixels.to(network.device))

    return features.stack([digest for q in questions for digest in q.image_digests], compute)
