"""Exact-match accuracy: greedy answers to held-out conversations, compared word for word, by question type."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.config import DataConfig, EvaluateConfig
from pipeline.conversation import tokenize_prompt
from pipeline.errors import BadSample, PipelineError, building, writing
from pipeline.inputs import Preparation, pad_rows
from pipeline.memory import TensorCache
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.shards import Rejected, Sample, expand_shards, read_shard

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


@dataclass(frozen=True)
class Question:
    """A sample's last turn as a prompt."""

    test_set: str
    sample: Sample
    prompt: tuple[int, ...]
    answer: str


def evaluate_model(
    model: str,
    data: DataConfig,
    settings: EvaluateConfig,
    *,
    output: Path,
    description: str = "evaluate",
) -> list[Prediction]:
    """Answer every held-out question with a checkpoint; predictions are kept in `output` (JSON lines).

    The last human turn of each conversation is asked, given the turns before it. A sample that cannot be asked
    raises: an accuracy over an unknown part of the test set is no accuracy.
    """
    preparation = Preparation.of(model, data)
    network = MobileVLMForCausalLM.from_pretrained(model, dtype=settings.dtype).eval()
    with building(f"model {model} on a GPU", then="set evaluate.dtype to bfloat16"):
        network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    questions = sorted(_questions(settings, preparation, data), key=lambda q: len(q.prompt))
    features = TensorCache(FEATURE_CACHE_BYTES)
    predictions: list[Prediction] = []
    for start in tqdm(range(0, len(questions), settings.batch_size), desc=description, unit="batch"):
        batch = questions[start : start + settings.batch_size]
        predictions += _answer(network, preparation, batch, features, settings.max_new_tokens)
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


def _questions(settings: EvaluateConfig, preparation: Preparation, data: DataConfig) -> Iterator[Question]:
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
        yield Question(test_set, item, tuple(prompt), item.conversations[-1]["value"])


def _answer(
    network: MobileVLMForCausalLM,
    preparation: Preparation,
    questions: Sequence[Question],
    features: TensorCache,
    max_new_tokens: int,
) -> list[Prediction]:
    """Greedy answers to a batch, prompts padded on the right (the model moves the padding to the left)."""
    mask = pad_rows([[1] * len(question.prompt) for question in questions], 0)
    generated = network.generate(
        pad_rows([question.prompt for question in questions], 0).to(network.device),
        patch_features=_patch_features(network, preparation, questions, features),
        attention_mask=mask.to(network.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=preparation.tokenizer.pad_token_id,
        eos_token_id=preparation.tokenizer.eos_token_id,
    )
    texts = preparation.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [
        Prediction(
            key=question.sample.key,
            group=question.sample.image_digests[0] if question.sample.image_digests else question.sample.key,
            question_type=str(question.sample.metadata.get("question_type", "all questions")),
            answer=question.answer,
            prediction=text,
            test_set=question.test_set,
        )
        for question, text in zip(questions, texts, strict=True)
    ]


@torch.inference_mode()
def _patch_features(
    network: MobileVLMForCausalLM,
    preparation: Preparation,
    questions: Sequence[Question],
    features: TensorCache,
) -> torch.Tensor | None:
    """The frozen tower's features 'I M W' of all images of the batch, each distinct image computed once."""
    images = {
        d: data for q in questions for d, data in zip(q.sample.image_digests, q.sample.images, strict=True)
    }
    if not images:
        return None

    def compute(fresh: list[str]) -> torch.Tensor:
        pixels = torch.stack([preparation.preprocess(images[digest]) for digest in fresh])
        return network.patch_features(pixels.to(network.device))

    return features.stack([digest for q in questions for digest in q.sample.image_digests], compute)
