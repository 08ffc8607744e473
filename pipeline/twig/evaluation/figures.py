"""All figures of an evaluation of twigs, as files."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import writing
from pipeline.twig.evaluation.curves import kept_figure, speed_figure
from pipeline.twig.evaluation.result import Evaluation
from pipeline.twig.evaluation.tradeoff import tradeoff_figure


def write_figures(result: Evaluation, folder: Path) -> None:
    """Write every figure that the result has the numbers for into a folder, as PNG and SVG."""
    figures = {
        "kept_curve": kept_figure(result),
        "speed_curve": speed_figure(result),
        "tradeoff": tradeoff_figure(result),
    }
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            if figure is not None:
                with writing(folder):
                    figure.savefig(folder / f"{name}.{ending}", dpi=150)
