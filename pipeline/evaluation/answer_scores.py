"""Scores of answers that need not equal their references: token F1, ROUGE-L, sentence recall, log probabilities."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapidfuzz.distance import Indel

from pipeline.config.config import EvaluateConfig
from pipeline.evaluation.predictions import Prediction
from pipeline.text_table import text_table

LONG_WORDS = 5  # references are long if their median has more words
NO_SPACES = (
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts in which a character counts as a word
)
# A mark that ends a sentence; the point in 3.5 ends none.
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]+")
WORD = re.compile(rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+")


def words(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case, as the package rouge-score does, but of any script.

    Articles count and punctuation does not: SQuAD's removal of articles is made for answers of a few words.
    """
    return WORD.findall(text.lower())


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the two multisets of words; 1 where both are empty."""
    ours, theirs = words(prediction), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L's F1 without stemming: twice the longest common subsequence of words, over all words of both."""
    ours, theirs = words(prediction), words(reference)
    return Indel.normalized_similarity(ours, theirs)


def sentence_recall(prediction: str, reference: str) -> float:
    """Return the share of the reference's sentences that are sentences of the prediction, word for word."""
    ours, theirs = Counter(_sentences(prediction)), Counter(_sentences(reference))
    if not theirs:
        return float(not ours)
    return (ours & theirs).total() / theirs.total()


def _sentences(text: str) -> list[tuple[str, ...]]:
    return [tuple(found) for part in SENTENCE_END.split(text) if (found := words(part))]


METRICS: dict[str, tuple[str, Callable[[Prediction], float]]] = {
    "exact_match": ("exact match, %", lambda p: float(p.correct)),
    "token_f1": ("token F1, %", lambda p: token_f1(p.prediction, p.answer)),
    "rouge_l": ("ROUGE-L, %", lambda p: rouge_l(p.prediction, p.answer)),
    "sentence_recall": ("sentence recall, %", lambda p: sentence_recall(p.prediction, p.answer)),
}
OF_LONG_ANSWERS = ["exact_match", "token_f1", "rouge_l"]


def metrics_for(settings: EvaluateConfig, predictions: Sequence[Prediction]) -> list[str]:
    """Return the metrics that a config asks for, or those that fit the length of the references."""
    if settings.metrics is not None:
        return list(dict.fromkeys(settings.metrics))
    return OF_LONG_ANSWERS if has_long_answers(predictions) else ["exact_match"]


def has_long_answers(predictions: Sequence[Prediction]) -> bool:
    """Return whether the median reference has more than `LONG_WORDS` words."""
    return statistics.median(len(words(prediction.answer)) for prediction in predictions) > LONG_WORDS


@dataclass(frozen=True)
class Scores:
    """Means over the questions of one type; log probabilities over the references that have one, in nats.

    `per_token` divides by all tokens of all references, `per_answer` by their number; None without references.
    """

    questions: int
    metrics: dict[str, float]
    references: int
    per_token: float | None
    per_answer: float | None

    @classmethod
    def of(cls, predictions: Sequence[Prediction], metrics: Sequence[str]) -> Scores:
        found = [(p.log_prob, p.num_tokens) for p in predictions if p.log_prob is not None and p.num_tokens]
        total, num_tokens = (sum(column) for column in zip(*found, strict=True)) if found else (0.0, 0)
        means = {name: statistics.fmean(map(METRICS[name][1], predictions)) for name in metrics}
        per_token, per_answer = (total / num_tokens, total / len(found)) if found else (None, None)
        return cls(len(predictions), means, len(found), per_token, per_answer)

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.metrics.items() if name != "exact_match"},
            "references": self.references,
            "log_prob_per_token": self.per_token,
            "log_prob_per_answer": self.per_answer,
        }


def scores_by_type(predictions: Sequence[Prediction], metrics: Sequence[str]) -> dict[str, Scores]:
    """Return question type -> scores, types by name, 'all' last."""
    types = sorted({p.question_type for p in predictions})
    groups = {kind: [p for p in predictions if p.question_type == kind] for kind in types}
    return {kind: Scores.of(some, metrics) for kind, some in (groups | {"all": predictions}).items()}


def score_table(models: Mapping[str, Sequence[Prediction]], metrics: Sequence[str]) -> str:
    """Return a row for each model: what accuracies do not show, over all questions."""
    names = [name for name in metrics if name != "exact_match"]
    heads = [*(METRICS[name][0] for name in names), "log p a token", "log p an answer"]
    rows, notes = [["all questions", *heads]], []
    for model, predictions in models.items():
        scores = Scores.of(predictions, metrics)
        logs = ["-" if value is None else f"{value:.4f}" for value in (scores.per_token, scores.per_answer)]
        rows.append([model, *(f"{100 * scores.metrics[name]:.2f}" for name in names), *logs])
        if absent := scores.questions - scores.references:
            notes.append(
                f"{model}: {absent:,} of {scores.questions:,} references have no log probability: they are longer "
                "than data.max_length, or the template cannot express them"
            )
    rows_text = text_table(rows)
    return "\n".join([rows_text, "log p: of the reference answer and its end mark, in nats", *notes])
