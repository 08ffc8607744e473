"""Pictures of numbers: where the lines lie, what the page is given, and the sweep's own plot."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_sweep import SEEDS, write_sweep

from pipeline.report.coinciding import groups_of, sentence
from pipeline.report.curves import (
    MAX_POINTS,
    Curve,
    Frame,
    Scale,
    draw_panel,
    draw_sweep,
    kind_for,
    step_ticks,
    thinned,
)
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


def panel_of(curves: list[Curve], scale: Scale, *, label: str = "x") -> str:
    steps = [step for curve in curves for step in curve.steps]
    return draw_panel(groups_of(curves, scale), Frame(scale, "loss, nats", steps), label=label)


def line_of(svg: str, series: int) -> tuple[list[tuple[float, float]], str]:
    """The points of a series' line, and its style."""
    paths = [attributes for tag, attributes in Elements(svg).tags if tag == "path"]
    [path] = [p for p in paths if f"var(--series-{series})" in (p["style"] or "")]
    numbers = [float(number) for number in re.findall(r"[-\d.]+", path["d"] or "")]
    return list(zip(numbers[::2], numbers[1::2], strict=True)), str(path["style"])


def test_a_line_lies_where_its_scale_says():
    svg = panel_of([Curve([0, 50, 100], [0.0, 2.0, 1.0], 3)], Scale(0.0, 4.0))
    # The axes take 19% to 95% of 237.6 points across, 21% to 97% of 158.4 from below.
    left, width = 0.19 * 237.6, 0.76 * 237.6
    bottom, height = 158.4 - 0.21 * 158.4, 0.76 * 158.4
    free = width * 0.03 / 1.06  # 3% of the steps' range at each end
    across = [left + free + (width - 2 * free) * part for part in (0, 0.5, 1)]
    expected = list(zip(across, [bottom - height * v / 4 for v in (0, 2, 1)], strict=True))
    points, _ = line_of(svg, 3)
    assert [value for point in points for value in point] == pytest.approx(
        [value for point in expected for value in point], abs=1e-3
    )


def test_a_logarithmic_line_lies_at_its_logarithms():
    svg = panel_of([Curve([0, 1, 2], [1.0, 0.1, 0.01], 1)], Scale(0.01, 1.0, "log"))
    (_, top), (_, middle), (_, bottom) = line_of(svg, 1)[0]
    assert middle == pytest.approx((top + bottom) / 2, abs=1e-3) and top < bottom


def test_a_panel_is_an_element_in_the_colours_of_its_page():
    svg = panel_of([Curve([0, 1], [0, 1], 2)], Scale(0, 1), label='the "term" <b>')
    assert svg.startswith(
        '<svg viewBox="0 0 237.6 158.4" role="img" aria-label="the &quot;term&quot; &lt;b&gt;">'
    )
    assert "http" not in svg and "font-family" not in svg and "<style" not in svg and "<!--" not in svg
    colours = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg)) - {"none"}
    assert colours == {"currentColor", "var(--rule)", "var(--series-2)"}


def test_two_panels_of_a_page_share_no_id_and_one_drawn_twice_is_the_same():
    curves, scale = [Curve([0, 1], [0, 1], 1)], Scale(0, 1)
    one, other = panel_of(curves, scale, label="one"), panel_of(curves, scale, label="other")
    assert not set(re.findall(r'id="([^"]+)"', one)) & set(re.findall(r'id="([^"]+)"', other))
    assert one == panel_of(curves, scale, label="one")


def test_one_panel_of_values_far_apart_makes_all_logarithmic_if_most_are_positive():
    assert kind_for([[0.05, 1.0], [1.0, 2.0]]) == "log"
    assert kind_for([[0.06, 1.0], [1.0, 2.0], [], [float("nan")]]) == "linear"
    assert kind_for([[0.05, 1.0], [0.0, 1.0]]) == "linear"
    assert kind_for([[0.05, 1.0], [-1e-9, 0.9, 1.0]]) == "log"
    assert Scale.covering([0.05, 1.0], "log") == Scale(0.05 / 1.2, 1.2, "log")
    assert Scale.covering([0.0, 1.0]) == Scale(-0.06, 1.06)


@pytest.mark.parametrize("values", [[1.0, 1.0], [1.9, 2.3], [1.0, 15.0], [0.9, 30.0], [0.001, 10.0]])
def test_a_logarithmic_axis_has_some_ticks_and_not_too_many(values: list[float]):
    texts = Elements(panel_of([Curve([1, 2], values, 1)], Scale.covering(values, "log"))).texts
    ticks = [float(text) for text in texts if re.fullmatch(r"[\d.]+", text)]
    assert 2 + 2 <= len(ticks) <= 8 + 2  # two are steps


@pytest.mark.parametrize(
    ("steps", "ticks"),
    [
        ([10, 20, 30], [10, 20, 30]),
        (range(100, 1600, 100), [300, 600, 900, 1200, 1500]),
        ([1, *range(100, 1600, 100)], [300, 700, 1100, 1500]),
        ([7], [7]),
    ],
)
def test_ticks_are_at_steps_that_were_logged(steps, ticks):
    assert step_ticks(steps) == ticks
    texts = Elements(panel_of([Curve(list(steps), [1.0] * len(steps), 1)], Scale(0, 2))).texts
    assert texts[: len(ticks)] == [f"{tick:,}" for tick in ticks]


def test_axes_are_named_and_panels_of_a_page_have_the_same_steps():
    curve, scale = Curve([10, 20], [1.0, 2.0], 1), Scale(0, 4)
    texts = Elements(draw_panel([[curve]], Frame(scale, "loss, nats", [10, 20, 30]), label="x")).texts
    assert {"optimizer step", "loss, nats", "30"} <= set(texts)


def test_curves_that_coincide_take_turns_and_are_named():
    low, high = [1.0, 0.5], [2.0, 1.0]
    curves = [Curve([1, 2], low, 1), Curve([1, 2], [1.001, 0.5], 2), Curve([1, 2], high, 3, dashed=True)]
    svg = panel_of(curves, scale := Scale(0.0, 2.5))
    dashes = [
        re.search(r"stroke-dasharray: ([^;]+); stroke-dashoffset: ([^;]+)", line_of(svg, n)[1])
        for n in (1, 2)
    ]
    assert dashes[0] and dashes[1] and dashes[0][1] == dashes[1][1] and dashes[0][2] != dashes[1][2]
    assert line_of(panel_of(curves[:1], scale), 1)[1].count("dash") == 0
    labels = {1: "all", 2: "attention", 3: "none"}
    assert sentence(curves, scale, labels) == "all and attention coincide"
    assert sentence([*curves, Curve([1, 2], high, 2)], scale, labels) == (
        "all and attention coincide in 1 of 2 runs; attention and none coincide in 1 of 2 runs"
    )
    assert (
        sentence([*curves, Curve([1, 2], low, 3)], scale, labels)
        == "all, attention and none coincide in 1 of 2 runs"
    )
    apart = [curves[0], Curve([1, 2], [1.02, 0.5], 2), Curve([1, 3], low, 3)]
    assert sentence(apart, scale, labels) == ""


def test_values_that_are_not_finite_coincide_with_their_like():
    nan = float("nan")
    curves = [Curve([1, 2], [1.0, nan], 1), Curve([1, 2], [1.0, nan], 2), Curve([1, 2], [1.0, 1.0], 3)]
    assert sentence(curves, Scale(0, 2), {1: "a", 2: "b", 3: "c"}) == "a and b coincide"


def test_a_value_of_zero_lies_under_a_logarithmic_panel():
    scale = Scale.covering([0.0, 0.05, 1.0, float("inf")], "log")
    assert scale == Scale(0.05 / 1.2, 1.2, "log")
    svg = panel_of([Curve([1, 2, 3], [0.0, 0.05, 1.0], 1)], scale)
    first, *others = (y for _, y in line_of(svg, 1)[0])
    assert first > 158.4 > max(others)  # the page's height
    curves = [Curve([1, 2], [0.0, 1.0], 1), Curve([1, 2], [-1e-9, 1.0], 2)]
    assert sentence(curves, scale, {1: "a", 2: "b"}) == "a and b coincide"


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
