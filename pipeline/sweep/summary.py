"""Summarise a sweep: mean over seeds, gain over labels only with its interval, share of the gap to the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.provenance import replace_text
from pipeline.evaluation.compare import Answered, gap_closed, paired_gain
from pipeline.sweep.lines import SUMMARY, Line, read_answers, read_teacher
from pipeline.sweep.variations import SEED, name_of
from pipeline.text_table import text_table

Row = dict[str, Any]


def summarise_sweep(folder: Path, lines: Mapping[str, Line]) -> dict[str, Any]:
    """Return and write `summary.json`: `rows`, one for each variation and test set, and the `teacher`'s accuracy.

    A run is compared with its baseline of the same seed on the same questions. The teacher is left out where it
    answered other questions.
    """
    answers = {name: read_answers(folder, line) for name, line in lines.items()}
    asked = {answered.questions for of_run in answers.values() for answered in of_run.values()}
    teacher = read_teacher(folder)
    of_teacher = read_answers(folder, teacher) if teacher else {}
    taught = {test_set: a for test_set, a in of_teacher.items() if a.questions in asked}
    variations: dict[str, list[Line]] = {}
    for line in lines.values():
        variations.setdefault(_label(line), []).append(line)
    rows = rows_of(variations, lines, answers, taught)
    accuracy = {name: teacher["accuracy"][name] for name in taught} if teacher else None
    summary = {"rows": rows, "teacher": accuracy or None}
    replace_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def rows_of(
    variations: Mapping[str, Sequence[Line]],
    lines: Mapping[str, Line],
    answers: Mapping[str, Mapping[str, Answered]],
    teacher: Mapping[str, Answered],
) -> list[Row]:
    """Return a row for each variation (label -> its lines, one a seed) and test set.

    `lines` and `answers` are by name of a run, `teacher` and a run's answers by test set.
    """
    return [
        {"label": label, **_row(group, lines, answers, test_set, teacher.get(test_set))}
        for label, group in variations.items()
        for test_set in answers[group[0]["name"]]
    ]


def summary_tables(summary: Mapping[str, Any]) -> str:
    """Return the rows as text, a table for each test set."""
    blocks = []
    for test_set in dict.fromkeys(row["test_set"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["test_set"] == test_set]
        blocks.append(f"test set {test_set}: {_caption(rows)}\n{text_table(_cells(rows, summary))}")
    return "\n\n".join(blocks)


def _cells(rows: Sequence[Row], summary: Mapping[str, Any]) -> list[list[str]]:
    cells = [["variation", "seeds", "accuracy, %", "gain, points", "95% interval", "gap closed, %"]]
    for row in rows:
        gain = row["gain"]
        cells.append([
            row["label"],
            str(len(row["seeds"])),
            f"{100 * row['accuracy']:.2f}",
            f"{100 * gain['difference']:+.2f}" if gain else "",
            f"[{100 * gain['low']:+.2f}, {100 * gain['high']:+.2f}]" if gain else "",
            f"{100 * row['gap_closed']:.0f}" if row["gap_closed"] is not None else "",
        ])  # fmt: skip
    if taught := (summary["teacher"] or {}).get(rows[0]["test_set"]):
        cells.append(["teacher", "", f"{100 * taught['all'][0]:.2f}", "", "", ""])
    return cells


def _caption(rows: Sequence[Row]) -> str:
    gains = [row["gain"] for row in rows if row["gain"]]
    if not gains:
        return f"{rows[0]['questions']:,} questions"
    counts = sorted({gain["num_seeds"] for gain in gains})
    if counts == [1]:
        seeds = "one training seed, other seeds not covered"
    elif counts[0] == 1:
        seeds = f"Student's t over up to {counts[-1]} seeds (with one seed: over images only)"
    else:
        seeds = f"Student's t over {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
    return (
        f"{gains[0]['num_questions']:,} questions of {gains[0]['num_images']:,} images\n"
        f"gain over labels alone, paired by question and seed; interval: bootstrap over images, {seeds}"
    )


def _varied(line: Line) -> dict[str, Any]:
    """What was varied but for the seed: runs that agree in it are one variation."""
    return {key: value for key, value in line["values"].items() if key != SEED}


def _label(line: Line) -> str:
    return name_of(_varied(line), between=", ")


def _row(
    group: Sequence[Line],
    lines: Mapping[str, Line],
    answers: Mapping[str, Mapping[str, Answered]],
    test_set: str,
    teacher: Answered | None,
) -> Row:
    # Seeds whose baseline is not finished are left out, so that accuracy and gain are of the same runs.
    group = [line for line in group if test_set in answers.get(line["baseline"], {})] or group
    scores = [line["accuracy"][test_set] for line in group]
    baselines = [line["baseline"] for line in group if test_set in answers.get(line["baseline"], {})]
    theirs = [answers[name][test_set] for name in baselines]
    is_baseline = group[0]["name"] == group[0]["baseline"]
    gain = None
    if theirs and not is_baseline:
        gain = paired_gain([answers[line["name"]][test_set] for line in group], theirs)
    return {
        "variation": _varied(group[0]),
        "seeds": [line["values"].get(SEED) for line in group],
        "test_set": test_set,
        "accuracy": fmean(score["all"][0] for score in scores),
        "accuracy_by_seed": [score["all"][0] for score in scores],
        "by_type": _means(scores),
        "baseline_by_type": _means([lines[name]["accuracy"][test_set] for name in baselines]),
        "questions": scores[0]["all"][1],
        "gain": asdict(gain) if gain else None,
        "gap_closed": _gap_closed(gain.difference, theirs, teacher) if gain else None,
    }


def _means(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Question type -> mean accuracy over runs; {} without runs."""
    return {kind: fmean(score[kind][0] for score in scores) for kind in scores[0]} if scores else {}


def _gap_closed(gain: float, baseline: Sequence[Answered], teacher: Answered | None) -> float | None:
    """The gain as a share of the teacher's lead over labels only; None if the teacher was asked other questions."""
    if teacher is None or teacher.questions != baseline[0].questions:
        return None
    none = fmean(float(run.correct.mean()) for run in baseline)
    return gap_closed(none + gain, none, float(teacher.correct.mean()))
