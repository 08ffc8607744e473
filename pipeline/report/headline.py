"""The four numbers at the top of a report, each with what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.cost import throughput_of
from pipeline.report.findings import Findings, Result
from pipeline.report.number_format import NOT_THERE, count, decimal, duration, percent, points

VALIDATION = "validation"  # by convention, the name of a test set on which variations are chosen


@dataclass(frozen=True)
class Headline:
    """A number, what it is, and how it was measured; without a number `detail` gives the reason."""

    name: str
    detail: str
    value: str = NOT_THERE
    unit: str = ""


def headlines(findings: Findings) -> list[Headline]:
    """Return gain (accuracy, without a labels-only run), gap closed, throughput and teacher time saved.

    A folder without a training has none.
    """
    if not findings.labels():
        return []
    best = best_result(findings)
    return [_gain(findings, best), _gap(findings, best), _throughput(findings, best), _saved(findings)]


def best_result(findings: Findings) -> Result | None:
    """Return the variation of the largest gain, or else accuracy; None if nothing was evaluated.

    With a test set named `validation` it is chosen there, and its result on the first other test set is returned.
    """
    test_sets = findings.test_sets()
    if not test_sets:
        return None
    shown = next((name for name in test_sets if name != VALIDATION), VALIDATION)
    rivals = _rivals(findings, VALIDATION if VALIDATION in test_sets else shown)
    best = max(rivals, key=lambda r: r.gain.difference if r.gain else r.accuracy)
    return next((r for r in findings.results if (r.label, r.test_set) == (best.label, shown)), best)


def _rivals(findings: Findings, test_set: str) -> list[Result]:
    """The results with a gain; all, if none has one."""
    results = [result for result in findings.results if result.test_set == test_set]
    return [result for result in results if result.gain] or results


def _gain(findings: Findings, best: Result | None) -> Headline:
    if best is None:
        return Headline("Accuracy", "Not measured: no held-out questions were answered.")
    if best.gain is None:
        asked = f"{count(best.num_questions)} questions of {best.test_set}"
        return Headline(
            "Accuracy",
            f"{best.label}, {asked}. No gain: no labels-only run.",
            percent(best.accuracy),
            "%",
        )
    gain = best.gain
    seeds = "one training seed" if gain.num_seeds == 1 else f"{gain.num_seeds} training seeds"
    detail = (
        f"95% interval {points(gain.low)} to {points(gain.high)}; {best.label}, {count(gain.num_images)} images of "
        f"{best.test_set}, {seeds}.{_chosen(findings, best)}"
    )
    return Headline("Gain over labels only", detail, points(gain.difference), "points")


def _chosen(findings: Findings, best: Result) -> str:
    """On which questions the best was chosen: if it is also measured on them, the number is biased upwards."""
    chooser = VALIDATION if VALIDATION in findings.test_sets() else best.test_set
    num_rivals = len(_rivals(findings, chooser))
    where = "these same questions" if chooser == best.test_set else chooser
    return f" The largest of {num_rivals}, chosen on {where}." if num_rivals > 1 else ""


def _gap(findings: Findings, best: Result | None) -> Headline:
    name = "Gap to the teacher closed"
    if best is None or not findings.teacher:
        return Headline(name, findings.teacher_absent or "Not measured: nothing was evaluated.")
    if best.gain is None:
        return Headline(name, "There is no labels-only run to start from.")
    if best.gap_closed is None:
        return Headline(name, "The teacher is not ahead of labels only by half a point.")
    none, teacher = best.accuracy - best.gain.difference, findings.teacher[best.test_set]["all"][0]
    detail = f"{best.label}: from labels only at {percent(none)}% towards the teacher's {percent(teacher)}%."
    return Headline(name, detail, percent(best.gap_closed, 0), "%")


def _throughput(findings: Findings, best: Result | None) -> Headline:
    label = best.label if best else findings.labels()[0]
    speed = throughput_of(label, findings.runs)
    if speed.samples_per_second is None:
        return Headline("Throughput", "No run says how fast it trained.")
    runs = "one run" if speed.num_runs == 1 else f"mean of {speed.num_runs} runs"
    threads = f", threads: {speed.threads}" if speed.threads != NOT_THERE else ""
    detail = f"{label}, {runs}{threads}. Training alone."
    return Headline("Throughput", detail, decimal(speed.samples_per_second, 0), "samples/s")


def _saved(findings: Findings) -> Headline:
    name, cost = "Teacher time saved", findings.store
    if cost is None:
        return Headline(name, "Not known: the store cannot be read.")
    if cost.saved_seconds is None:
        return Headline(name, cost.why_not_saved)
    value, unit = duration(cost.saved_seconds).split()
    runs = "one run" if cost.num_runs == 1 else f"{cost.num_runs} runs"
    paid = "" if cost.saved_seconds >= 0 else " Stage 1 has not paid back yet."
    once = duration(cost.store.teacher_seconds)
    return Headline(
        name, f"An estimate: an online teacher for {runs}, minus stage 1 once ({once}).{paid}", value, unit
    )
