"""Pictures of numbers: where the lines lie, what the page is given, and the sweep's own plot."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_sweep import SEEDS, write_sweep

from pipeline.report.curves import MAX_POINTS, Curve, Scale, draw_panel, draw_sweep, thinned
from pipeline.report.run_folder import read_json

pytestmark = pytest.mark.slow


class Elements(HTMLParser):
    """Tags with their attributes, and texts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def line_of(svg: str, series: int) -> tuple[list[tuple[float, float]], str]:
    """The points of a series' line, and its style."""
    paths = [attributes for tag, attributes in Elements(svg).tags if tag == "path"]
    [path] = [p for p in paths if f"var(--series-{series})" in (p["style"] or "")]
    numbers = [float(number) for number in re.findall(r"[-\d.]+", path["d"] or "")]
    return list(zip(numbers[::2], numbers[1::2], strict=True)), str(path["style"])


def test_a_line_lies_where_its_scale_says():
    svg = draw_panel([Curve([0, 50, 100], [0.0, 2.0, 1.0], 3)], Scale(0.0, 4.0), label="x")
    # The axes take 15% to 98% of 237.6 points across, 13% to 96% of 136.8 from below.
    left, width = 0.15 * 237.6, 0.83 * 237.6
    bottom, height = 136.8 - 0.13 * 136.8, 0.83 * 136.8
    free = width * (1 - 1 / 1.1) / 2  # matplotlib leaves 5% of the data's range at each end
    across = [left + free + (width - 2 * free) * part for part in (0, 0.5, 1)]
    expected = list(zip(across, [bottom - height * v / 4 for v in (0, 2, 1)], strict=True))
    points, _ = line_of(svg, 3)
    assert [value for point in points for value in point] == pytest.approx(
        [value for point in expected for value in point], abs=1e-3
    )


def test_a_logarithmic_line_lies_at_its_logarithms():
    svg = draw_panel([Curve([0, 1, 2], [1.0, 0.1, 0.01], 1)], Scale(0.01, 1.0, "log"), label="x")
    (_, top), (_, middle), (_, bottom) = line_of(svg, 1)[0]
    assert middle == pytest.approx((top + bottom) / 2, abs=1e-3) and top < bottom


def test_a_panel_is_an_element_in_the_colours_of_its_page():
    svg = draw_panel([Curve([0, 1], [0, 1], 2)], Scale(0, 1), label='the "term" <b>')
    assert svg.startswith(
        '<svg viewBox="0 0 237.6 136.8" role="img" aria-label="the &quot;term&quot; &lt;b&gt;">'
    )
    assert "http" not in svg and "font-family" not in svg and "<style" not in svg and "<!--" not in svg
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) - {"none"}
    assert colours == {"currentColor", "var(--rule)", "var(--series-2)"}


def test_two_panels_of_a_page_share_no_id_and_one_drawn_twice_is_the_same():
    curves, scale = [Curve([0, 1], [0, 1], 1)], Scale(0, 1)
    one, other = draw_panel(curves, scale, label="one"), draw_panel(curves, scale, label="other")
    assert not set(re.findall(r'id="([^"]+)"', one)) & set(re.findall(r'id="([^"]+)"', other))
    assert one == draw_panel(curves, scale, label="one")


def test_values_far_apart_and_positive_get_a_logarithmic_scale():
    assert Scale.covering([0.05, 1.0]) == Scale(0.05 / 1.2, 1.2, "log")
    assert Scale.covering([0.06, 1.0]).kind == "linear"
    assert Scale.covering([0.0, 1.0]) == Scale(-0.06, 1.06)


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [float("nan")], [-1.0]])
def test_any_values_get_a_scale_with_room(values: list[float]):
    scale = Scale.covering(values)
    assert scale.low < scale.high and scale.kind == "linear"


def test_a_long_log_is_thinned_to_means_of_neighbours():
    assert thinned([1.0, 2.0]) == [1.0, 2.0] and thinned([]) == []
    assert MAX_POINTS == 300
    long = thinned(list(range(601)))  # 0, 1, ... 600 in blocks of three
    assert len(long) == 201 and long[:2] == [1.0, 4.0] and long[-1] == 600.0  # the last block is one number


def test_the_plot_of_a_sweep_names_its_variations_and_test_sets(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", store=tmp_path, test_sets=("validation", "test"))
    summary = read_json(folder / "summary.json")
    png, svg = folder / "summary.png", folder / "summary.svg"
    draw_sweep(summary["rows"], png, svg, teacher=summary["teacher"])
    with Image.open(png) as picture:
        assert picture.format == "PNG" and picture.width == 9 * 160
    texts = Elements(svg.read_text()).texts
    assert {"losses=all", "losses=none", "validation: 100 questions", "test: 100 questions"} <= set(texts)
    assert texts.count("teacher") == 2


def test_the_plot_shows_every_seed_and_an_interval_for_all_but_the_baseline(tmp_path: Path):
    rows = read_json(write_sweep(tmp_path / "s", store=tmp_path) / "summary.json")["rows"]
    draw_sweep(rows, tmp_path / "a.png", tmp_path / "a.svg")
    dots = [
        attributes["style"] or ""
        for tag, attributes in Elements((tmp_path / "a.svg").read_text()).tags
        if tag == "use"
    ]
    rings = [style for style in dots if "fill-opacity: 0" in style or "fill: none" in style]
    assert len(rings) == len(rows) * len(SEEDS)
    assert len(dots) - len(rings) == len(rows) + 2  # the means, and two gains


def test_the_same_sweep_makes_the_same_files(tmp_path: Path):
    rows = read_json(write_sweep(tmp_path / "s", store=tmp_path) / "summary.json")["rows"]
    for name in ("a", "b"):
        draw_sweep(rows, tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
