"""Accuracy kept under pruning: scores with it over scores without it, by question type, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean

import numpy as np

from pipeline.errors import PipelineError
from pipeline.evaluation.answer_scores import METRICS, has_long_answers
from pipeline.evaluation.predictions import Prediction, by_test_set
from pipeline.resampling import means_over_seeds, resampled_totals
from pipeline.twig.evaluation.kept import Pruned
from pipeline.twig.evaluation.result import Interval, KeptRow
from pipeline.twig.evaluation.selectors import TWIG

SHORT, LONG = "short", "long"
METRIC_OF = {SHORT: "exact_match", LONG: "sentence_recall"}

Runs = Mapping[Pruned, Sequence[Prediction]]


def kinds_of(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return question type -> `short` or `long`, by the length of its references."""
    types = sorted({one.question_type for one in predictions})
    of_type = {kind: [one for one in predictions if one.question_type == kind] for kind in types}
    return {kind: LONG if has_long_answers(some) else SHORT for kind, some in of_type.items()}


def kept_rows(whole: Sequence[Prediction], runs: Runs, *, seed: int = 0) -> list[KeptRow]:
    """Return the rows of all test sets: for each kind of question those of each selector and share.

    Images are resampled, the same ones for every run. Over several twigs the mean is drawn from Student's t, as in
    `paired_gain`. Raises `PipelineError` if the runs answer other questions than `whole`.
    """
    rows: list[KeptRow] = []
    sets = {run: by_test_set(predictions) for run, predictions in runs.items()}
    for test_set, of_whole in by_test_set(whole).items():
        of_runs = {run: of_set.get(test_set, []) for run, of_set in sets.items()}
        if any(_asked(predictions) != _asked(of_whole) for predictions in of_runs.values()):
            raise PipelineError("the selectors answered different questions; evaluate again with --overwrite")
        rows += _Table.of(of_whole, of_runs, seed=seed).rows(test_set)
    return rows


def _asked(predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
    return [(one.key, one.answer) for one in predictions]


@dataclass(frozen=True)
class _Table:
    """Totals of scores by kind of question: `whole` 'kinds', `runs` 'kinds' each, and the same of all resamples."""

    kinds: Sequence[str]
    questions: np.ndarray  # 'kinds'
    images: np.ndarray  # 'kinds'
    whole: np.ndarray
    runs: Mapping[Pruned, np.ndarray]
    resampled_whole: np.ndarray  # 'resamples kinds'
    resampled: Mapping[Pruned, np.ndarray]
    seed: int

    @classmethod
    def of(cls, whole: Sequence[Prediction], runs: Runs, *, seed: int) -> _Table:
        types = kinds_of(whole)
        kinds = [*(kind for kind in (SHORT, LONG) if kind in types.values()), *types]
        belongs = np.array(
            [[kind in (one.question_type, types[one.question_type]) for kind in kinds] for one in whole],
            dtype=float,
        )
        groups = np.unique([one.group for one in whole], return_inverse=True)[1]

        def totals(predictions: Sequence[Prediction]) -> np.ndarray:
            scores = [METRICS[METRIC_OF[types[one.question_type]]][1](one) for one in predictions]
            made = np.zeros((groups.max() + 1, len(kinds)))
            np.add.at(made, groups, belongs * np.array(scores)[:, None])
            return made

        of_images = [totals(whole), *(totals(predictions) for predictions in runs.values())]
        drawn = resampled_totals(np.concatenate(of_images, axis=1), np.zeros(len(of_images[0])), seed=seed)
        first, *others = np.split(drawn, len(of_images), axis=1)
        asked = np.zeros((groups.max() + 1, len(kinds)))
        np.add.at(asked, groups, belongs)
        return cls(
            kinds,
            belongs.sum(axis=0).astype(int),
            (asked > 0).sum(axis=0),
            of_images[0].sum(axis=0),
            {run: made.sum(axis=0) for run, made in zip(runs, of_images[1:], strict=True)},
            first,
            dict(zip(runs, others, strict=True)),
            seed,
        )

    def rows(self, test_set: str) -> list[KeptRow]:
        """Return all rows, kind by kind."""
        measured = dict.fromkeys((run.selector, run.keep) for run in self.runs)
        return [
            self._row(test_set, kind, number, selector, keep)
            for number, kind in enumerate(self.kinds)
            for selector, keep in measured
            if keep is not None
        ]

    def _row(self, test_set: str, kind: str, number: int, selector: str, keep: Fraction) -> KeptRow:
        mine = self._runs(selector, keep)
        totals = [float(self.runs[run][number]) for run in mine]
        whole, questions = float(self.whole[number]), int(self.questions[number])
        kept = beside = None
        by_twig: list[float] = []
        if whole:
            by_twig = [total / whole for total in totals]
            ratios = self._ratios(mine, number)
            kept = self._interval(fmean(by_twig), ratios)
            twigs = [] if selector == TWIG else self._runs(TWIG, keep)
            if twigs:
                theirs = self._ratios(twigs, number)
                middle = fmean(by_twig) - fmean(float(self.runs[run][number]) / whole for run in twigs)
                beside = self._interval(middle, ratios - theirs)
        return KeptRow(
            test_set,
            kind,
            selector,
            str(keep),
            questions,
            int(self.images[number]),
            fmean(totals) / questions,
            whole / questions,
            kept,
            by_twig,
            beside,
        )

    def _runs(self, selector: str, keep: Fraction) -> list[Pruned]:
        return [run for run in self.runs if (run.selector, run.keep) == (selector, keep)]

    def _ratios(self, runs: Sequence[Pruned], number: int) -> np.ndarray:
        """Return the ratios 'seeds resamples'; NaN where a resample's answers without pruning are all wrong."""
        whole = self.resampled_whole[:, number]
        ours = np.stack([self.resampled[run][:, number] for run in runs])
        return np.divide(ours, whole, out=np.full_like(ours, np.nan), where=whole > 0)

    def _interval(self, middle: float, ratios: np.ndarray) -> Interval:
        means = means_over_seeds(ratios, seed=self.seed)
        low, high = np.nanquantile(means, [0.025, 0.975])
        return Interval(middle, float(low), float(high))
