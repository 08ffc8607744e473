"""`alignkd report`: the findings of a run, an experiment or a sweep as one self-contained HTML page."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import writing
from pipeline.evaluation.compare import MIN_GAP
from pipeline.phone.picture import bench_figure
from pipeline.readable import readable_bytes
from pipeline.report import number_format
from pipeline.report.cost import throughput_of
from pipeline.report.curve_panels import draw_curves
from pipeline.report.curves import FIRST_SERIES, INK, MAX_POINTS, inline
from pipeline.report.findings import Findings
from pipeline.report.forest import ForestAxis
from pipeline.report.gather import gather
from pipeline.report.headline import headlines
from pipeline.report.twig import twig_tables

PAGE = "report.html"
FILTERS = ("percent", "points", "count", "decimal", "duration", "clock")


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run, an experiment or a sweep and return its path: `report.html` in the folder by default.

    Raises `PipelineError` if the folder is none of these, or one of its files is damaged.
    """
    page = render_page(gather(folder))
    target = output or folder / PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target):
        target.write_text(page, encoding="utf-8")
    return target


def render_page(findings: Findings) -> str:
    """Return the page's HTML; every text from outside is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(number_format, name) for name in FILTERS} | {
        "bytes": readable_bytes
    }
    types = dict.fromkeys(t for counts in findings.questions.values() for t in counts if t != "all")
    return environment.get_template("page.html.j2").render(
        zip=zip,
        findings=findings,
        headlines=headlines(findings),
        created=created(findings.origin.created),
        axis=ForestAxis.covering([result.gain for result in findings.results if result.gain]),
        types=list(types),
        has_gaps_by_type=any(result.gap_by_type for result in findings.results),
        min_gap=MIN_GAP,
        curves=draw_curves(findings),
        max_points=MAX_POINTS,
        phone_plot=phone_plot(findings),
        twig=twig_tables(findings),
        throughputs=[throughput_of(label, findings.runs) for label in findings.labels()],
        config=yaml.safe_dump(
            dict(findings.config), sort_keys=False, allow_unicode=True
        ),  # it holds no token
    )


def phone_plot(findings: Findings) -> str:
    """Return the plot of size against accuracy as SVG; '' if nothing was measured."""
    if findings.phone is None:
        return ""
    figure = bench_figure(findings.phone, ink=INK, point=FIRST_SERIES)
    return inline(figure, "accuracy of each runtime by the size of its files")


def created(time: str) -> str:
    """Return an ISO time as a date and minutes; '' if there is none."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M %Z}" if time else ""
