"""The card of the study's teacher: measured like any checkpoint, on each held-out set, by type of question."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.evaluate import Prediction, accuracy_by_type, by_test_set
from pipeline.studies.emoji.scenes import QUESTIONS

CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# What the emoji study's teacher learned

A projector (LDPNetV2, {projector:,} parameters) and low-rank changes of rank {rank} to the seven linear maps of
each of SmolLM2's 30 layers ({changes:,} parameters), float16: {megabytes:.1f} MB in `learned.safetensors`.
`make emoji` puts them on top of what packages carry: SmolLM2-135M-Instruct (Apache-2.0, from its Q4_1 GGUF file)
and EfficientNet-Lite0 (Apache-2.0), both unchanged otherwise. For the study and the tests of alignkd; good for
nothing else.

Made by `make emoji-teacher` (seed 0) from {questions:,} questions about {scenes:,} scenes in three artists' styles:
noto (Apache-2.0), twemoji (CC BY 4.0) and openmoji (CC BY-SA 4.0). None of the art is here or in this repository.

Accuracy in percent, greedy answers, exact match. `new_scene`: the training concepts and styles in new scenes;
`unseen_style`: a fourth artist's style (fluent-emoji-flat, MIT); `unseen_concept`: {held_out} concepts that no
training scene shows. The last row gives each question the commonest training answer to its type.

| | {types} |
|---|{rules}|
{rows}
"""


def write_card(
    file: Path,
    predictions: Sequence[Prediction],
    *,
    training_records: Sequence[Mapping[str, Any]],
    learned_sizes: Mapping[str, int],
    rank: int,
    held_out: int,
    num_scenes: int,
) -> str:
    """Write the card and return it. `learned_sizes` are numbers of parameters by tensor name.

    `training_records` are what the last row's answers are counted in; the teacher saw `num_scenes` scenes.
    """
    sets = by_test_set(predictions)
    types = list(accuracy_by_type(predictions))
    rows = {name: accuracy_by_type(answered) for name, answered in sets.items()}
    rows["commonest answer"] = accuracy_by_type(commonest_answers(predictions, training_records))
    projector = sum(size for name, size in learned_sizes.items() if "mm_projector" in name)
    total = sum(learned_sizes.values())
    text = CARD.format(
        projector=projector,
        changes=total - projector,
        megabytes=2 * total / 1e6,
        rank=rank,
        held_out=held_out,
        scenes=num_scenes,
        questions=len(QUESTIONS) * num_scenes,
        types=" | ".join(types),
        rules="|".join("---" for _ in types),
        rows="\n".join(
            f"| {name} | {' | '.join(f'{100 * scores[kind][0]:.1f}' for kind in types)} |"
            for name, scores in rows.items()
        ),
    )
    file.write_text(text)
    return text


def commonest_answers(
    predictions: Sequence[Prediction], training_records: Sequence[Mapping[str, Any]]
) -> list[Prediction]:
    """The same questions, each answered with what training scenes answer most to its type."""
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in training_records:
        given[record["question_type"]][record["conversations"][-1]["value"]] += 1
    commonest = {kind: answers.most_common(1)[0][0] for kind, answers in given.items()}
    return [
        Prediction(p.key, p.group, p.question_type, p.answer, commonest[p.question_type], p.test_set)
        for p in predictions
    ]
