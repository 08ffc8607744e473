"""`alignkd report`: the numbers of a run, an experiment or a sweep as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.errors import writing
from pipeline.evaluation.compare import MIN_GAP
from pipeline.report import number_format
from pipeline.report.curve_panels import draw_curves
from pipeline.report.curves import MAX_POINTS
from pipeline.report.findings import Findings
from pipeline.report.forest import ForestAxis
from pipeline.report.gather import gather
from pipeline.report.headline import headlines, why_not_saved
from pipeline.report.throughput import throughput_of
from pipeline.upkeep.describe import readable_bytes

PAGE = "report.html"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run, an experiment or a sweep and return where it is: `report.html` in its folder.

    Raises `PipelineError` if the folder is none of these, or one of its files is damaged.
    """
    page = render_page(gather(folder))
    target = output or folder / PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target):
        target.write_text(page, encoding="utf-8")
    return target


def render_page(findings: Findings) -> str:
    """The page's HTML; every text from outside is escaped."""
    types = list(dict.fromkeys(t for counts in findings.questions.values() for t in counts if t != "all"))
    gains = [result.gain for result in findings.results if result.gain]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            findings=findings,
            headlines=headlines(findings),
            created=created(findings.origin.created),
            axis=ForestAxis.covering(gains),
            types=types,
            has_gaps_by_type=any(result.gap_by_type for result in findings.results),
            min_gap=MIN_GAP,
            curves=draw_curves(findings),
            max_points=MAX_POINTS,
            throughputs=[throughput_of(label, findings.runs) for label in findings.labels()],
            why_not_saved=why_not_saved,
            config=config_text(findings.config),
        )
    )


def created(time: str) -> str:
    """An ISO time as a date and minutes; '' if there is none."""
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M %Z}" if time else ""


def config_text(config: Mapping[str, Any]) -> str:
    """The config as YAML. It holds no token: `Config` takes none."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("percent", "points", "count", "decimal", "duration", "clock"):
        environment.filters[name] = getattr(number_format, name)
    environment.globals["zip"] = zip
    environment.filters["bytes"] = readable_bytes
    return environment
