"""The paper's table with measured rows above the published ones, intervals, and a comparison of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.benchmarks.paper import PAPER
from pipeline.benchmarks.scores import AVERAGED, BenchmarkScore, Interval, SuiteScores, differences
from pipeline.text_table import text_table

NONE = "-"


def suite_text(models: Sequence[SuiteScores]) -> str:
    """Return the tables and the notes that belong to them."""
    names = _short_names([model.model for model in models])
    return "\n\n".join([_paper_table(models, names), _interval_table(models, names), _notes(models)])


def _short_names(models: Sequence[str]) -> list[str]:
    """Return the last parts of models' paths or ids if they tell the models apart, else the whole names."""
    short = [model.rstrip("/").rsplit("/", 1)[-1] for model in models]
    return short if len(set(short)) == len(short) else list(models)


def _paper_table(models: Sequence[SuiteScores], names: Sequence[str]) -> str:
    """Return the form of the paper: a row a model, measured ones first."""
    rows = [["", *(row.title for row in AVERAGED), "Avg"]]
    for model, name in zip(models, names, strict=True):
        cells = [_cell(model.scores.get(row.name)) for row in AVERAGED]
        rows.append([name, *cells, NONE if model.average is None else f"{model.average.value:.1f}"])
    for paper in PAPER:
        cells = [f"{paper.scores[row.name]:.1f}" for row in AVERAGED]
        rows.append([f"published: {paper.name}", *cells, f"{paper.average:.1f}"])
    return text_table(rows)


def _cell(score: BenchmarkScore | None) -> str:
    if score is None:
        return NONE
    return f"{score.headline.value:.1f}{'*' if score.lacks else ''}"


def _interval_table(models: Sequence[SuiteScores], names: Sequence[str]) -> str:
    """Return a row a benchmark, a column a model: the headline with its 95% interval."""
    first = models[0].scores
    pair = differences(models[0], models[1]) if len(models) == 2 else {}
    heads = ["95% intervals", "metric", "questions", *names]
    rows = [[*heads, *([f"{names[0]} minus {names[1]}"] if pair else [])]]
    for name, score in first.items():
        cells = [model.scores[name].headline.text() for model in models]
        cells += [pair[name].text(signed=True)] if pair else []
        rows.append([score.benchmark.title, score.benchmark.metric, _questions(score), *cells])
    averages = [model.average for model in models]
    if all(averages):
        cells = [average.text() for average in averages if average is not None]
        cells += [pair["average"].text(signed=True)] if pair else []
        rows.append(["Avg", "mean of the six, MME / 20", "", *cells])
    return text_table(rows)


def _questions(score: BenchmarkScore) -> str:
    asked = f"{score.num_questions:,}"
    return f"sample of {asked} from {score.num_all:,}" if score.is_sample else asked


def _notes(models: Sequence[SuiteScores]) -> str:
    """Return what a reader must know of the numbers."""
    notes = [f"published rows: {source}" for source in dict.fromkeys(paper.source for paper in PAPER)]
    if missing := models[0].missing:
        notes.append(
            f"no average: it is the mean of all six whole published splits; missing: {', '.join(missing)}"
        )
    scores = models[0].scores.values()
    if any(score.lacks for score in scores):
        notes.append(
            "* not all questions of the published split, or others: not comparable with published numbers"
        )
    notes += [
        f"{score.benchmark.title}: {score.num_all:,} questions in these files, "
        f"{' or '.join(f'{n:,}' for n in score.benchmark.num_questions)} are published"
        for score in scores
        if not score.is_published
    ]
    if any(score.measures.get("rotations") == 1 for score in scores):
        notes.append("MMB-dev: the file holds no rotations, so that circular accuracy is plain accuracy")
    return "\n".join(notes)


def suite_json(models: Sequence[SuiteScores]) -> dict[str, Any]:
    """Return all scores, intervals and published rows."""
    pair = differences(models[0], models[1]) if len(models) == 2 else {}
    return {
        "models": {model.model: _model_json(model) for model in models},
        "missing": models[0].missing,
        "first_minus_second": _intervals(pair),
        "published": [
            {"name": row.name, "source": row.source, **row.scores, "average": row.average} for row in PAPER
        ],
    }


def _model_json(model: SuiteScores) -> dict[str, Any]:
    benchmarks = {name: score.to_json() for name, score in model.scores.items()}
    return {"benchmarks": benchmarks, "average": model.average.to_json() if model.average else None}


def _intervals(found: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_json() for name, interval in found.items()}
