"""What a sweep left in its folder: its summary's rows, its runs, and which labels-only run each was held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.distill.training.training_folder import STATE_FILE
from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Gain, gap_closed
from pipeline.report.findings import Result, Scores, TrainingRun, gaps_closed
from pipeline.report.run_folder import (
    in_order,
    named_if_damaged,
    read_json,
    read_run,
    reads_teacher,
)
from pipeline.sweep.lines import RUNS, SUMMARY, SWEEP, read_lines
from pipeline.sweep.run import run_folder
from pipeline.sweep.variations import SEED


class SweepFolder:
    """A finished sweep. Everything here raises `PipelineError` naming the file that is damaged or not there.

    `lines` are the runs that the summary is of.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings: dict[str, Any] = read_json(folder / SWEEP)
        self.summary: dict[str, Any] = read_json(folder / SUMMARY)
        with named_if_damaged(folder / SUMMARY):
            labels = {_variation(row["variation"]): str(row["label"]) for row in self.summary["rows"]}
        with named_if_damaged(folder / SWEEP):
            self.identities: dict[str, str] = dict(self.settings["runs"])
        lines = read_lines(folder)
        with named_if_damaged(folder / RUNS):
            self.lines = [line for line in lines if self._is_summarised(line, labels)]
            self.label_of_run = {line["name"]: labels[_variation(line["values"])] for line in self.lines}
            self.baselines = {self.label_of_run[line["name"]]: self.label_of_run.get(line["baseline"])
                              for line in self.lines}  # fmt: skip
        if lost := sorted(set(labels.values()) - set(self.label_of_run.values())):
            raise PipelineError(
                f"{folder / SUMMARY} has {lost[0]!r}, {folder / RUNS} has no run of it; run `alignkd sweep` again"
            )

    def varied(self) -> dict[str, list[Any]]:
        """Setting -> its values, each once, in the order of the runs."""
        values: dict[str, list[Any]] = {}
        for line in self.lines:
            for key, value in line["values"].items():
                if value not in values.setdefault(key, []):
                    values[key].append(value)
        return values

    def teacher(self) -> dict[str, Scores]:
        """Its scores by test set; none if it was not evaluated."""
        with named_if_damaged(self.folder / SUMMARY):
            found = self.summary["teacher"] or {}
            return {
                test_set: {name: (float(share), int(number)) for name, (share, number) in scores.items()}
                for test_set, scores in found.items()
            }

    def results(self) -> tuple[Result, ...]:
        """The summary's rows in its own order; to them the gap closed by question type is added."""
        teacher = self.teacher()
        with named_if_damaged(self.folder / SUMMARY):
            return tuple(
                self._with_gaps(self._result(row), row["baseline_by_type"], teacher)
                for row in self.summary["rows"]
            )

    def questions(self) -> dict[str, dict[str, int]]:
        """Test set -> question type -> number of questions, as the runs answered them."""
        counts: dict[str, dict[str, int]] = {}
        with named_if_damaged(self.folder / RUNS):
            for line in self.lines:
                for test_set, scores in line["accuracy"].items():
                    of_set = counts.setdefault(test_set, {})
                    of_set |= {name: number for name, (_, number) in scores.items()}
        return counts

    def runs(self) -> tuple[TrainingRun, ...]:
        """Every run by the sweep's own record; one whose folder is gone has no history."""
        with named_if_damaged(self.folder / RUNS):
            return tuple(self._run(line) for line in self.lines)

    def run_folders(self) -> list[Path]:
        """The folders of the runs that are still there."""
        folders = [self.folder / run_folder(line["name"]) for line in self.lines]
        return [folder for folder in folders if (folder / STATE_FILE).is_file()]

    def _is_summarised(self, line: Mapping[str, Any], labels: Mapping[Any, str]) -> bool:
        """Runs of an earlier sweep into the same folder, or with other settings, stay in its file alone."""
        is_of_this = self.identities.get(line["name"]) == line["identity"]
        return is_of_this and _variation(line["values"]) in labels

    def _result(self, row: Mapping[str, Any]) -> Result:
        return Result(
            label=row["label"],
            test_set=row["test_set"],
            accuracy=row["accuracy"],
            by_seed=tuple(row["accuracy_by_seed"]),
            by_type={name: share for name, share in row["by_type"].items() if name != "all"},
            num_questions=row["questions"],
            is_baseline=row["gain"] is None and row["label"] in self.baselines.values(),
            gain=Gain(**row["gain"]) if row["gain"] else None,
            gap_closed=row["gap_closed"],
            gap_by_type={},
        )

    def _with_gaps(self, result: Result, none: Mapping[str, float], teacher: Mapping[str, Scores]) -> Result:
        """Gap closed by question type; no gap where teacher and student were asked different questions."""
        taught = teacher.get(result.test_set)
        if result.is_baseline or not none or taught is None or taught["all"][1] != result.num_questions:
            return replace(result, gap_closed=None)
        is_wide = gap_closed(result.accuracy, none["all"], taught["all"][0]) is not None
        return replace(
            result,
            gap_closed=result.gap_closed if is_wide else None,
            gap_by_type=gaps_closed(result.by_type, none, taught),
        )

    def _run(self, line: Mapping[str, Any]) -> TrainingRun:
        folder, label = self.folder / run_folder(line["name"]), self.label_of_run[line["name"]]
        terms = in_order(line["terms"])
        return TrainingRun(
            label=label,
            name=line["name"],
            terms=terms,
            reads_teacher=reads_teacher(terms),
            history=read_run(folder, label).history if (folder / STATE_FILE).is_file() else None,
            steps=line["steps"],
            samples_seen=line["samples_seen"],
            train_seconds=line["train_seconds"],
            samples_per_second=line["samples_per_second"],
            threads=line["threads"],
        )


def _variation(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What was varied, without the seed; values by their text, since a list cannot be a key."""
    return tuple(sorted((key, repr(value)) for key, value in values.items() if key != SEED))
