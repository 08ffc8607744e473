"""The card of the base models: what each answers to the questions of the set `choice`, by type."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.evaluation.predictions import Prediction, accuracy_by_type
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.cards import most_frequent_answers
from pipeline.studies.scenes.data import BASE_SETS
from pipeline.studies.scenes.dropping import without_vision
from pipeline.studies.scenes.facts import precision, recall
from pipeline.studies.scenes.measuring import exact_shares
from pipeline.studies.scenes.texts import QUESTIONS, SHORT_QUESTIONS
from pipeline.studies.scenes.training import STEPS, WIPE_LAYER, Kind, read_lessons

TEMPLATE = Path(__file__).with_suffix(".md")
DATA = DataConfig(shards="none", template="chatml", max_length=256)
LONG_QUESTIONS = [question for question in QUESTIONS if question not in SHORT_QUESTIONS]
# A row of the table: its name, and a share from 0 to 1 for some of the types.
Row = tuple[str, Mapping[str, float]]


def write_base_card(study: Path, learned: Path) -> None:
    """Measure both base models in `study` on `choice`, and write README.md beside what they learned."""
    rows: list[Row] = []
    for kind in get_args(Kind):
        rows += rows_of(study / "models" / kind, study, name=kind)
    records = json.loads((study / "data" / "train.json").read_text())
    asked = json.loads((study / "data" / "choice.json").read_text())
    rows.append(("most frequent training answer", accuracy_of_most_frequent(records, asked)))
    text = TEMPLATE.read_text().format(
        table=table_of(rows),
        scenes=sum(scenes.num_images for scenes in BASE_SETS.values()),
        **{f"{kind}_steps": number for kind, number in STEPS.items()},
    )
    (learned / "README.md").write_text(text)
    print(text)


def rows_of(checkpoint: Path, study: Path, *, name: str) -> list[Row]:
    """Return the rows of one base model: exact answers, facts of the long ones, and exact answers when wiped."""
    settings = EvaluateConfig(shards=str(study / "shards" / "choice"), max_new_tokens=80, batch_size=100)
    output = study / "bases" / name / "predictions.jsonl"
    answers = evaluate_model(str(checkpoint), DATA, settings, output=output, description=name)
    exact = {kind: share for kind, (share, _) in accuracy_by_type(answers).items()}
    model = MobileVLMForCausalLM.from_pretrained(checkpoint).eval()
    lessons = read_lessons(model, checkpoint, study, sets=["choice"])
    wiped = exact_shares(model, lessons, lambda ids: {WIPE_LAYER: without_vision(ids)})
    return [
        (f"{name}: exact", exact),
        (f"{name}: facts recalled", mean_of(recall, answers)),
        (f"{name}: stated facts that are right", mean_of(precision, answers)),
        (f"{name}, wiped at layer {WIPE_LAYER}: exact", wiped),
    ]


def mean_of(score: Callable[[str, str], float], answers: Sequence[Prediction]) -> dict[str, float]:
    """Return the mean of a score of (answer, reference) over each type of long question."""
    found = {kind: [a for a in answers if a.question_type == kind] for kind in LONG_QUESTIONS}
    return {
        kind: sum(score(a.prediction, a.answer) for a in some) / len(some) for kind, some in found.items()
    }


def accuracy_of_most_frequent(training: Sequence[Mapping], asked: Sequence[Mapping]) -> dict[str, float]:
    """Return how often the most frequent training answer to a type of question is right: a text-only baseline."""
    frequent = most_frequent_answers((r["question_type"], r["conversations"][-1]["value"]) for r in training)
    hits = [
        (r["question_type"], frequent[r["question_type"]] == r["conversations"][-1]["value"]) for r in asked
    ]
    found = {kind: [hit for of, hit in hits if of == kind] for kind in QUESTIONS}
    return {kind: sum(some) / len(some) for kind, some in found.items()}


def table_of(rows: Sequence[Row]) -> str:
    """Return a Markdown table of percents."""
    lines = [f"| | {' | '.join(QUESTIONS)} |", "|---" * (len(QUESTIONS) + 1) + "|"]
    for name, shares in rows:
        cells = (f"{100 * shares[kind]:.1f}" if kind in shares else "" for kind in QUESTIONS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
