"""Greedy answers to held-out conversations, and the log probability of the reference answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.config.provenance import replace_text
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import building
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.question_batches import QuestionBatches
from pipeline.evaluation.questions import Question, read_questions
from pipeline.evaluation.references import reference_log_probs
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.progress import Progress


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
