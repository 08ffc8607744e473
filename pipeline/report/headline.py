"""The three or four numbers at the top of a report, each with what it was measured on."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.report.findings import Findings, Result, StoreCost
from pipeline.report.number_format import NOT_THERE, count, decimal, duration, percent, points
from pipeline.report.throughput import throughput_of

VALIDATION = "validation"  # the name of a test set on which variations are chosen, by convention


@dataclass(frozen=True)
class Headline:
    """A number, what it is, and how it was measured; where there is none, `detail` says why."""

    name: str
    value: str
    unit: str
    detail: str


def headlines(findings: Findings) -> list[Headline]:
    """Gain (or accuracy, without a labels-only run), gap closed, throughput, teacher time saved."""
    best = best_result(findings)
    return [_gain(findings, best), _gap(findings, best), _throughput(findings, best), _saved(findings)]


def best_result(findings: Findings) -> Result | None:
    """The variation with the largest gain, or else accuracy; None if nothing was evaluated.

    With a test set called `validation` it is chosen there, and its result on the first other test set is given.
    """
    test_sets = findings.test_sets()
    if not test_sets:
        return None
    shown = next((name for name in test_sets if name != VALIDATION), VALIDATION)
    chooser = VALIDATION if VALIDATION in test_sets else shown
    rivals = _rivals(findings, chooser)
    best = max(rivals, key=lambda r: r.gain.difference if r.gain else r.accuracy)
    return next((r for r in findings.results if (r.label, r.test_set) == (best.label, shown)), best)


def _rivals(findings: Findings, test_set: str) -> list[Result]:
    """Those with a gain; all, if none has one."""
    results = [result for result in findings.results if result.test_set == test_set]
    return [result for result in results if result.gain] or results


def _gain(findings: Findings, best: Result | None) -> Headline:
    if best is None:
        return Headline("Accuracy", NOT_THERE, "", "Not measured: no held-out questions were answered.")
    if best.gain is None:
        asked = f"{count(best.num_questions)} questions of {best.test_set}"
        detail = f"{best.label}, {asked}. No gain: no labels-only run."
        return Headline("Accuracy", percent(best.accuracy), "%", detail)
    gain = best.gain
    seeds = "one training seed" if gain.num_seeds == 1 else f"{gain.num_seeds} training seeds"
    detail = (
        f"95% interval {points(gain.low)} to {points(gain.high)}; {best.label}, {count(gain.num_images)} images of "
        f"{best.test_set}, {seeds}.{_chosen(findings, best)}"
    )
    return Headline("Gain over labels only", points(gain.difference), "points", detail)


def _chosen(findings: Findings, best: Result) -> str:
    """A largest number among several, chosen on the questions that it is measured on, flatters: so it is said."""
    chooser = VALIDATION if VALIDATION in findings.test_sets() else best.test_set
    num_rivals = len(_rivals(findings, chooser))
    if num_rivals < 2:
        return ""
    where = "these same questions" if chooser == best.test_set else chooser
    return f" The largest of {num_rivals}, chosen on {where}."


def _gap(findings: Findings, best: Result | None) -> Headline:
    name = "Gap to the teacher closed"
    if best is None or not findings.teacher:
        return Headline(
            name, NOT_THERE, "", findings.teacher_absent or "Not measured: nothing was evaluated."
        )
    if best.gain is None:
        return Headline(name, NOT_THERE, "", "No labels-only run to count from.")
    if best.gap_closed is None:
        return Headline(name, NOT_THERE, "", "The teacher is not ahead of labels only by half a point.")
    teacher = findings.teacher[best.test_set]["all"][0]
    way = f"from labels only at {percent(best.accuracy - best.gain.difference)}% towards the teacher's"
    return Headline(name, percent(best.gap_closed, 0), "%", f"{best.label}: {way} {percent(teacher)}%.")


def _throughput(findings: Findings, best: Result | None) -> Headline:
    label = best.label if best else findings.labels()[0]
    speed = throughput_of(label, findings.runs)
    if speed.samples_per_second is None:
        return Headline("Throughput", NOT_THERE, "", "No run says how fast it trained.")
    runs = "one run" if speed.num_runs == 1 else f"mean of {speed.num_runs} runs"
    threads = f", threads: {speed.threads}" if speed.threads != NOT_THERE else ""
    detail = f"{label}, {runs}{threads}. Training alone."
    return Headline("Throughput", decimal(speed.samples_per_second, 0), "samples/s", detail)


def _saved(findings: Findings) -> Headline:
    name = "Teacher time saved"
    if findings.store is None:
        return Headline(name, NOT_THERE, "", "Not known: the store cannot be read.")
    if findings.store.saved_seconds is None:
        return Headline(name, NOT_THERE, "", why_not_saved(findings.store))
    value, unit = duration(findings.store.saved_seconds).split()
    runs = "one run" if findings.store.num_runs == 1 else f"{findings.store.num_runs} runs"
    once = duration(findings.store.teacher_seconds)
    paid = "" if findings.store.saved_seconds >= 0 else " Stage 1 has not paid back yet."
    detail = f"An estimate: an online teacher for {runs}, less stage 1 once ({once}).{paid}"
    return Headline(name, value, unit, detail)


def why_not_saved(store: StoreCost) -> str:
    """Which number the estimate lacks."""
    if store.num_runs == 0:
        return "No run here reads the teacher."
    if store.teacher_seconds is None:
        return "Not known: the store does not say how long the teacher took."
    return "Not known: not every run says how many samples it saw."
