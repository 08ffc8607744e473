"""Exact-match accuracy: greedy answers to held-out conversations, compared word for word, by question type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import GenerationConfig

from cache import Span
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.config.provenance import replace_text
from pipeline.data.conversation import tokenize_prompt
from pipeline.data.preparation import Preparation, pad_rows
from pipeline.data.shards import Rejected, expand_shards, read_shard, read_span
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import BadSample, PipelineError, ShardError, building
from pipeline.models.mobilevlm import MobileVLMForCausalLM

PREDICTIONS_FILE = "predictions.jsonl"
FEATURE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prediction:
    """The answer to one question of a test set; `group` is shared by the questions of one image (bootstrap)."""

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
    """A sample's last turn as a prompt: where its images lie, and not their bytes, since there may be many."""

    unanswered: Prediction
    prompt: NDArray[np.int32]
    shard: str
    image_digests: tuple[str, ...]
    image_spans: tuple[Span, ...]

    def read_image(self, number: int) -> bytes:
        """Return the bytes of an image. Raises `ShardError` if the shard changed since the question was read."""
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
    """Answer every held-out question with a checkpoint and write the predictions to `output` (JSON lines).

    The last human turn of each conversation is asked, given the turns before it. `device` is a GPU by default, if
    there is one. Raises `BadSample` for a sample that cannot be asked: an accuracy over an unknown part of the test
    set would mean nothing.
    """
    preparation = Preparation.of(model, data)
    network = MobileVLMForCausalLM.from_pretrained(model, dtype=settings.dtype).eval()
    with building(f"model {model} on a GPU", then="set evaluate.dtype to bfloat16"):
        network = network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Replaces the checkpoint's own, from which transformers takes whatever a call does not name.
    network.generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=preparation.tokenizer.pad_token_id,
        eos_token_id=preparation.tokenizer.eos_token_id,
    )
    questions = sorted(read_questions(settings, preparation, data), key=lambda q: len(q.prompt))
    features = TensorCache(FEATURE_CACHE_BYTES)
    predictions: list[Prediction] = []
    for start in tqdm(range(0, len(questions), settings.batch_size), desc=description, unit="batch"):
        batch = questions[start : start + settings.batch_size]
        predictions += _answer(network, preparation, batch, features)
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
    for test_set, shard in shards:
        for item in read_shard(shard, max_pixels=data.max_image_pixels):
            if isinstance(item, Rejected):
                raise BadSample("a test sample cannot be asked", f"{item.key!r} of {shard}: {item.reason}")
            unanswered = Prediction(
                key=item.key,
                group=item.image_digests[0] if item.image_digests else item.key,
                question_type=str(item.metadata.get("question_type", "all questions")),
                answer=item.conversations[-1]["value"],
                prediction="",
                test_set=test_set,
            )
            prompt = tokenize_prompt(item.conversations, preparation.tokenizer, template=preparation.template)
            ids = np.array(prompt, dtype=np.int32)
            yield Question(unanswered, ids, shard, item.image_digests, item.image_spans)


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
    return [replace(q.unanswered, prediction=text) for q, text in zip(questions, texts, strict=True)]


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
