"""The model card of the demo's teacher: measured like any checkpoint, beside a model without eyes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from pipeline.config.config import load_config
from pipeline.evaluation.evaluate import Prediction, accuracy_by_type
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies import demo


def answer_by_question_alone() -> dict[str, tuple[float, int]]:
    """The text-only baseline: each test question gets the training split's commonest answer to it."""
    answers: dict[str, Counter[str]] = {}
    for question, answer, _ in demo.questions("train"):
        answers.setdefault(question, Counter())[answer] += 1
    predictions = [
        Prediction(
            str(number),
            str(image),
            demo.question_type(answer),
            answer,
            answers[question].most_common(1)[0][0],
        )
        for number, (question, answer, image) in enumerate(demo.questions("test"))
    ]
    return accuracy_by_type(predictions)


CARD = """\
---
license: mit
datasets: [easy-VQA]
---
# The demo's teacher

MobileVLM V2's architecture at demo size, trained from nothing on easy-VQA's training split (MIT): a CLIP tower
of 64 patches, LDPNetV2 to 16 vision tokens, LLaMA of {layers} layers and width {width}. {language:,} parameters
in the language model, {total:,} in all, float32. For the demo and the tests of alignkd; good for nothing else.

Made by `make demo-teacher` (seed {seed}, {tower_epochs} epochs of the tower, {language_epochs} of the language
model, {minutes:.0f} minutes on {threads} CPU threads). Accuracy in percent, greedy answers, exact match, on the
published test split ({questions:,} questions on 1,000 images that no training touched):

| | {types} |
|---|{rules}|
| this teacher | {teacher} |
| question alone (commonest training answer) | {alone} |

74% of the answers are yes or no, so the types are told apart and the last row says what a model without eyes gets.
"""


def write_card(output: Path, model: MobileVLMForCausalLM, **facts: object) -> None:
    """Evaluate the checkpoint as any other, from shards of the test split, and write README.md beside it."""
    config = load_config("configs/demo.yaml", [f"teacher.model={output}"])
    predictions = evaluate_checkpoint(config, str(output))
    scores, alone = accuracy_by_type(predictions), answer_by_question_alone()
    row = {name: f"{100 * share:.2f}" for name, (share, _) in scores.items()}
    text = CARD.format(
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        language=demo.language_parameters(model),
        total=sum(p.numel() for p in model.parameters()),
        questions=len(predictions),
        types=" | ".join(scores),
        rules="|".join("---" for _ in scores),
        teacher=" | ".join(row.values()),
        alone=" | ".join(f"{100 * alone[name][0]:.2f}" for name in scores),
        threads=torch.get_num_threads(),
        **facts,
    )
    (output / "README.md").write_text(text)
    print(text)
