"""The model card of the demo's teacher, which is evaluated like any checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config.config import load_config
from pipeline.evaluation.evaluate import Prediction, accuracy_by_type
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies import demo
from pipeline.studies.cards import accuracy_table, commonest_answers

CARD = Path(__file__).with_name("demo_card.md")


def answers_without_images() -> list[Prediction]:
    """Return the text-only baseline: the training split's most frequent answer to each test question."""
    commonest = commonest_answers((question, answer) for question, answer, _ in demo.questions("train"))
    return [
        Prediction(str(number), str(image), demo.question_type(answer), answer, commonest[question])
        for number, (question, answer, image) in enumerate(demo.questions("test"))
    ]


def write_card(output: Path, model: MobileVLMForCausalLM, **facts: object) -> None:
    """Evaluate the checkpoint in `output` on shards of the test split, and write its README.md."""
    config = load_config("configs/demo.yaml", [f"teacher.model={output}"])
    predictions = evaluate_checkpoint(config, str(output))
    scores = {
        "this teacher": accuracy_by_type(predictions),
        "question alone (most frequent training answer)": accuracy_by_type(answers_without_images()),
    }
    text = CARD.read_text().format(
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        language=demo.language_parameters(model),
        total=sum(p.numel() for p in model.parameters()),
        questions=len(predictions),
        table=accuracy_table(scores, decimals=2),
        threads=torch.get_num_threads(),
        **facts,
    )
    (output / "README.md").write_text(text)
    print(text)
