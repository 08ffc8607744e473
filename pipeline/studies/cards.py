"""The model cards of the two studies' teachers, which are evaluated like any checkpoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.evaluation.predictions import Prediction, accuracy_by_type


def most_frequent_answers(asked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the most frequent answer to each question of (question, answer) pairs: a text-only baseline."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in asked:
        answers[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def write_card(
    file: Path, template: Path, rows: Mapping[str, Sequence[Prediction]], *, decimals: int, **facts: object
) -> None:
    """Fill a template with facts and a table, write it, and print it. The table gives a row of percents a name."""
    scores = {name: accuracy_by_type(predictions) for name, predictions in rows.items()}
    types = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(types)} |", "|---" * (len(types) + 1) + "|"]
    for name, by_type in scores.items():
        percents = (f"{100 * by_type[kind][0]:.{decimals}f}" for kind in types)
        lines.append(f"| {name} | {' | '.join(percents)} |")
    text = template.read_text().format(table="\n".join(lines), **facts)
    file.write_text(text)
    print(text)
