"""What the cards of the two studies' teachers share: the answers of a text-only baseline, and the table."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping


def commonest_answers(asked: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the most frequent answer to each question of (question, answer) pairs."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in asked:
        answers[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def accuracy_table(rows: Mapping[str, Mapping[str, tuple[float, int]]], *, decimals: int) -> str:
    """Return a Markdown table in percent of `accuracy_by_type` results, a row for each name."""
    types = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(types)} |", "|---" * (len(types) + 1) + "|"]
    for name, scores in rows.items():
        percents = (f"{100 * scores[kind][0]:.{decimals}f}" for kind in types)
        lines.append(f"| {name} | {' | '.join(percents)} |")
    return "\n".join(lines)
