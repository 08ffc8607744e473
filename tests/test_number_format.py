"""Numbers of a report have one form in a column; gains have a place in the plot beside them."""

from __future__ import annotations

from pipeline.evaluation.compare import Gain
from pipeline.report.forest import MARGIN, WIDTH, ForestAxis
from pipeline.report.number_format import clock, count, decimal, duration, percent, points
from pipeline.report.page import created


def test_numbers_of_a_column_have_one_form():
    assert [percent(0.99654), percent(-0.01, 0), percent(None)] == ["99.65", "−1", "-"]
    assert [points(0.057), points(-0.0012), points(0.0), points(None)] == ["+5.70", "−0.12", "+0.00", "-"]
    assert [count(9673), count(None), decimal(1234.56), decimal(None)] == ["9,673", "-", "1,234.6", "-"]


def test_durations_take_the_unit_that_suits():
    seconds = [0.0123, 1.5, 119, 120, 7199, 7200, 360_000, 3.6e7, -90, None]
    expected = ["12.3 ms", "1.5 s", "119 s", "2 min", "120 min", "2 h", "100 h", "10,000 h", "−90 s", "-"]
    assert [duration(s) for s in seconds] == expected
    assert [clock(s) for s in (48.4, 3725, 360_000, None)] == ["0:00:48", "1:02:05", "100:00:00", "-"]


def test_a_time_is_shown_to_the_minute_with_its_zone():
    assert created("2025-11-21T10:00:59+00:00") == "2025-11-21 10:00 UTC" and created("") == ""


def test_the_forest_covers_every_interval_and_zero():
    gains = [Gain(0.05, 0.02, 0.08, 1, 1), Gain(-0.01, -0.02, 0.0, 1, 1)]
    axis = ForestAxis.covering(gains)
    assert axis is not None and (axis.low, axis.high) == (-0.02, 0.08)
    assert axis.place(-0.02) == MARGIN and axis.place(0.08) == WIDTH - MARGIN
    assert axis.place(0.03) == WIDTH / 2
    assert axis.ticks == (-2.0, 0.0, 2.0, 4.0, 6.0, 8.0)


def test_gains_that_are_all_nothing_have_an_axis_and_no_gain_has_none():
    axis = ForestAxis.covering([Gain(0.0, 0.0, 0.0, 1, 1)])
    assert axis is not None and axis.place(0.0) == WIDTH / 2
    assert ForestAxis.covering([]) is None
