"""What the page says of an evaluation of twigs: tables, curves, and the picture of kept tokens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.curves import INK, NUM_SERIES, inline
from pipeline.report.findings import Findings
from pipeline.twig.evaluation.curves import kept_figure, speed_figure
from pipeline.twig.evaluation.result import Evaluation
from pipeline.twig.evaluation.tables import (
    SPEED_HEADS,
    beside_cells,
    kept_cells,
    speed_cells,
    speed_of,
    type_cells,
)
from pipeline.twig.evaluation.tradeoff import tradeoff_figure

SERIES = [f"#0001{number:02x}" for number in range(1, NUM_SERIES + 1)]

Cells = Sequence[Sequence[str]]


@dataclass(frozen=True)
class TwigTables:
    """Tables by their captions, each with `num_heads` rows of heads; curves as `<svg>`; the picture as a data URL."""

    tables: Sequence[tuple[str, int, Cells]]
    curves: Sequence[tuple[str, str]]
    picture: str
    notes: Sequence[str]


def twig_tables(findings: Findings) -> TwigTables | None:
    """Return what there is to show; None if no twig was evaluated."""
    if (result := findings.twig) is None:
        return None
    curves = (
        ("accuracy kept, by vision tokens kept", kept_figure(result, ink=INK, colours=SERIES)),
        ("speed, by drafts accepted", speed_figure(result, ink=INK, colours=SERIES)),
        ("accuracy kept, by speed", tradeoff_figure(result, ink=INK, colours=SERIES)),
    )
    drawn = [(name, inline(figure, name)) for name, figure in curves if figure is not None]
    picture = base64.b64encode(findings.twig_picture).decode()
    return TwigTables(
        _tables(result),
        drawn,
        f"data:image/png;base64,{picture}" if picture else "",
        result.notes,
    )


def _tables(result: Evaluation) -> list[tuple[str, int, Cells]]:
    tables: list[tuple[str, int, Cells]] = []
    for test_set in result.test_sets():
        of_set = f", {test_set}" if len(result.test_sets()) > 1 else ""
        tables.append((f"accuracy kept, %{of_set}", 1, kept_cells(result, test_set)))
        if others := beside_cells(result, test_set):
            tables.append((f"beside the twig, points{of_set}", 1, others))
        tables.append((f"scores by question type, %{of_set}", 3, type_cells(result, test_set)))
    for kind in dict.fromkeys(row.kind for row in result.speed):
        rows = [[row.way, *speed_cells(row)] for row in speed_of(result.speed, kind)]
        tables.append((f"speed, {kind} answers", 1, [["", *SPEED_HEADS], *rows]))
    return tables
