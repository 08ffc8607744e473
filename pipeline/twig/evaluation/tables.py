"""The result of an evaluation as text tables."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.text_table import text_table
from pipeline.twig.evaluation.result import Evaluation, Interval, KeptRow, SpeedRow
from pipeline.twig.evaluation.scoring import LONG, SHORT

SPEED_HEADS = (
    "drafts accepted, %",
    "tokens a pass",
    "tokens/s",
    "ms an answer",
    "ratio of tokens/s",
    "times as fast",
    "operations",
    "same text, %",
)  # fmt: skip


def tables_of(result: Evaluation) -> str:
    """Return all tables, and what they were measured with."""
    blocks: list[str] = []
    for test_set in result.test_sets():
        title = f"test set {test_set}\n" if len(result.test_sets()) > 1 else ""
        blocks.append(title + text_table(kept_cells(result, test_set)))
        if others := beside_cells(result, test_set):
            blocks.append(text_table(others))
        blocks.append(text_table(type_cells(result, test_set), num_heads=3))
    blocks += [speed_table(result.speed, kind) for kind in (SHORT, LONG) if speed_of(result.speed, kind)]
    return "\n\n".join([*blocks, "\n".join(result.notes)])


def kept_cells(result: Evaluation, test_set: str) -> list[list[str]]:
    """Return the accuracy kept by all short and by all long answers, in percent with intervals; heads first."""
    return _by_share(result, test_set, "accuracy kept, %", lambda row: interval_text(row.kept))


def beside_cells(result: Evaluation, test_set: str) -> list[list[str]]:
    """Return the accuracy kept less the twig's own, in points; nothing where there is nothing to compare."""
    if not any(row.beside_twig for row in result.kept):
        return []
    return _by_share(
        result, test_set, "beside the twig, points", lambda row: interval_text(row.beside_twig, sign="+")
    )


def _by_share(
    result: Evaluation, test_set: str, name: str, show: Callable[[KeptRow], str]
) -> list[list[str]]:
    kinds = [kind for kind in result.kinds(test_set) if kind in (SHORT, LONG)]
    shares = list(dict.fromkeys(row.keep for row in result.kept))
    rows = [[name, *(f"{kind}, {share} kept" for kind in kinds for share in shares)]]
    for selector in result.selectors():
        of_kinds = {kind: {r.keep: r for r in result.rows(test_set, kind, selector)} for kind in kinds}
        rows.append([selector, *(show(of_kinds[kind][share]) for kind in kinds for share in shares)])
    return rows


def type_cells(result: Evaluation, test_set: str) -> list[list[str]]:
    """Return the scores by question type in percent: three rows of heads, then a row for each way."""
    types = [kind for kind in result.kinds(test_set) if kind not in (SHORT, LONG)]
    first = {kind: result.rows(test_set, kind, result.selectors()[0])[0] for kind in types}
    rows = [
        ["score, %", *types],
        ["metric", *(result.types[kind].replace("_", " ") for kind in types)],
        ["questions", *(f"{first[kind].questions:,}" for kind in types)],
        ["no pruning", *(f"{100 * first[kind].whole:.2f}" for kind in types)],
    ]
    for selector in result.selectors():
        of_types = [result.rows(test_set, kind, selector) for kind in types]
        for of_share in zip(*of_types, strict=True):
            name = f"{selector}, {of_share[0].keep} kept"
            rows.append([name, *(f"{100 * row.score:.2f}" for row in of_share)])
    return rows


def speed_of(rows: list[SpeedRow], kind: str) -> list[SpeedRow]:
    """Return the rows of short or of long questions."""
    return [row for row in rows if row.kind == kind]


def speed_table(rows: list[SpeedRow], kind: str) -> str:
    """Return the speed of each way for short or long questions."""
    table = [[f"{kind} answers", *SPEED_HEADS]]
    return text_table(table + [[row.way, *speed_cells(row)] for row in speed_of(rows, kind)])


def speed_cells(row: SpeedRow) -> list[str]:
    """Return the cells of a way, in the order of `SPEED_HEADS`."""
    return [
        _percent(row.acceptance),
        "-" if row.tokens_a_pass is None else f"{row.tokens_a_pass:.2f}",
        f"{row.tokens_a_second:.1f}",
        f"{1000 * row.seconds:.1f}",
        str(row.tokens_ratio or "-"),
        str(row.time_ratio or "-"),
        "-" if row.operations_ratio is None else f"{row.operations_ratio:.2f}",
        _percent(row.same),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def interval_text(interval: Interval | None, *, sign: str = "") -> str:
    """Return an interval of shares in percent, '-' for none."""
    if interval is None:
        return "-"
    value, low, high = (100 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
