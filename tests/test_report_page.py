"""The page of a report: it needs nothing but itself, escapes what it is given and names what is not there."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_sweep import write_run, write_sweep
from test_report import change, write_timed_store

from pipeline.compare import Gain
from pipeline.forest import MARGIN, WIDTH, ForestAxis
from pipeline.number_format import clock, count, decimal, duration, percent, points
from pipeline.report import gather
from pipeline.report_page import config_text, created, render_page, write_report

ROOT = Path(__file__).parent.parent
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page read strictly: every element is closed in its order; its words without white space, tags, tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._words.append(data)
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.rows[-1][-1] += data.strip()

    def row(self, start: str, *, nth: int = 0) -> list[str]:
        """The cells of the nth table row that starts with these words."""
        return [row for row in self.rows if row and row[0] == start][nth]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))


def page_of(folder: Path) -> Page:
    return Page(render_page(gather(folder)))


# The page as a file


def test_the_page_is_written_beside_what_it_reports_or_where_it_is_asked_for(sweep: Path, tmp_path: Path):
    assert write_report(sweep) == sweep / "report.html"
    other = tmp_path / "new" / "page.html"
    assert write_report(sweep, other) == other
    assert other.read_text(encoding="utf-8") == (sweep / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_network_and_no_script(sweep: Path):
    text = render_page(gather(sweep))
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert "<script" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    page = Page(text)
    names = ("href", "xlink:href", "src", "srcset", "action", "data", "poster")
    addresses = {attributes[name] for _, attributes in page.tags for name in names if name in attributes}
    assert all(address.startswith("#") for address in addresses)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    policy = {attributes.get("http-equiv"): attributes.get("content") for _, attributes in page.tags}
    assert policy["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_id_of_the_page_is_there_once_and_what_is_used_is_defined(sweep: Path):
    text = render_page(gather(sweep))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", text))


def test_names_from_outside_are_escaped(sweep: Path):
    evil = "<script>alert('&')</script>"
    summary = json.loads((sweep / "summary.json").read_text())
    summary["rows"][0] |= {"label": evil, "by_type": {evil: 0.5}}
    change(sweep / "summary.json", **summary)
    lines = [json.loads(line) for line in (sweep / "runs.jsonl").read_text().splitlines()]
    for line in lines:
        line["terms"][evil] = 0.1
        line["accuracy"]["test"][evil] = [0.5, 10]
    (sweep / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(sweep / "runs" / "again", ["supervised", evil], config={})
    shutil.copy(
        sweep / "runs" / "again" / "trainer_state.json", sweep / lines[0]["folder"] / "trainer_state.json"
    )
    text = render_page(gather(sweep))
    assert "<script" not in text
    assert Page(text).row(evil)[0] == evil


def test_the_template_is_shipped_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["package-data"]["pipeline"]
    assert all((ROOT / "pipeline" / name).is_file() for name in shipped)
    assert "report.html.j2" in shipped


# What it says


def test_the_headlines_say_what_was_measured_on_what(sweep: Path):
    text = page_of(sweep).text
    assert (
        "Gain over labels only +18.00 points 95% interval +14.00 to +21.00; losses=all, 20 images of test, 2 "
        in text
    )
    assert "2 training seeds. The largest of 2, chosen on these same questions." in text
    assert (
        "Gap to the teacher closed 72 % losses=all: from labels only at 69.00% towards the teacher's 94.00%."
        in text
    )
    assert "Throughput 2 samples/s" in text or "Throughput 3 samples/s" in text
    assert "losses=all, mean of 2 runs, threads: 1. Training alone." in text
    assert (
        "Teacher time saved 3.15 min An estimate: an online teacher for 4 runs, less stage 1 once (3 s)."
        in text
    )


def test_the_tables_hold_the_numbers_in_the_summarys_order(sweep: Path):
    page = page_of(sweep)
    assert page.row("teacher")[:3] == ["teacher", "", "94.00"]
    assert page.row("losses=all")[:6] == [
        "losses=all",
        "2",
        "87.00",
        "85.00 to 89.00",
        "+18.00",
        "+14.00 to +21.00",
    ]
    assert page.row("losses=all")[-1] == "72"
    assert page.row("losses=none")[:5] == ["losses=none", "2", "69.00", "67.00 to 71.00", "labels only"]
    assert page.row("questions") == ["questions", "40", "60", "", ""]
    assert page.row("losses=attention", nth=1) == ["losses=attention", "85.00", "75.00", "40", "40"]
    assert page.row("losses=none", nth=1) == ["losses=none", "75.00", "65.00", "", ""]
    assert page.row("losses=all", nth=2) == [
        "losses=all", "2", "1", "30", "96", "0:00:48", "2.5", "2.0 to 3.0"
    ]  # fmt: skip


def test_several_test_sets_are_told_apart(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", store=tmp_path, test_sets=("new_scene", "unseen_style"))
    page = page_of(folder)
    assert page.row("new_scene") == ["new_scene"] and page.row("unseen_style", nth=1)[1] == "40"
    assert "new_scene: 100 questions on 20 images. unseen_style: 100 questions on 20 images." in page.text


def test_the_headline_is_chosen_on_the_validation_set_and_measured_on_another(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", store=tmp_path, test_sets=("test", "validation"))
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        if (row["label"], row["test_set"]) == ("losses=attention", "validation"):
            row["gain"]["difference"] = 0.5
    change(folder / "summary.json", **summary)
    text = page_of(folder).text
    assert "Gain over labels only +10.00 points" in text
    assert (
        "losses=attention, 20 images of test, 2 training seeds. The largest of 2, chosen on validation."
        in text
    )


def test_every_term_has_its_three_panels(sweep: Path):
    page = page_of(sweep)
    labels = [
        attributes["aria-label"]
        for tag, attributes in page.tags
        if tag == "svg" and "aria-label" in attributes
    ]
    for term in ("supervised", "attention", "vision_all"):
        for kind in ("raw", "weighted", "share of gradient norm"):
            assert f"{term}: {kind}, over optimizer steps" in labels
    assert (
        "one thin line for each of 6 runs; seeds of a variation look alike, labels only is dashed."
        in page.text
    )


def test_the_estimate_of_the_time_saved_shows_its_numbers(sweep: Path):
    text = page_of(sweep).text
    assert "The 4 runs that read the teacher saw 384 samples together." in text
    assert (
        "at stage 1's speed 3.2 min in all. The cache took 3 s once. Saved: 3.15 min of the teacher's time."
        in text
    )
    assert (
        "An estimate, not a measurement: samples seen × (stage 1's time / samples cached) − stage 1's time."
        in text
    )
    assert "3 s for stage 1, 500 ms a sample" in text and "each stored once for 1.50 uses" in text


def test_a_cache_that_has_not_paid_back_says_so(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised", "logits"], config={"cache": {"path": str(store)}})
    state = tmp_path / "run" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    log[-1] |= {"train_runtime": 2.0}  # two samples a second
    change(state, log_history=log)
    text = page_of(tmp_path / "run").text
    assert "The run that reads the teacher saw 4 samples." in text
    assert "Not paid back yet: 1 s more than these runs would have used." in text
    assert "Teacher time saved −1 s" in text and "Stage 1 has not paid back yet." in text


def test_the_config_stands_in_the_page_without_its_secrets(sweep: Path):
    config = {
        "train": {"hub_token": "hf_secret", "push_to_hub_token": None, "seed": 0},
        "output_dir": "runs/x",
    }
    text = config_text(config)
    assert "hf_secret" not in text and "hub_token: (not shown)" in text and "push_to_hub_token: null" in text
    assert "output_dir: runs/sweep" in page_of(sweep).text


# What it does not have


def test_without_a_teacher_the_gap_is_named_as_not_measured(sweep: Path):
    change(sweep / "summary.json", teacher=None)
    page = page_of(sweep)
    assert "Gap to the teacher closed - The teacher was not evaluated on these questions" in page.text
    assert "Gap closed is not shown: it needs a labels-only run and the teacher's answers." in page.text
    assert page.row("losses=all")[-1] == "-"
    assert page.row("losses=all", nth=1) == ["losses=all", "90.00", "85.00"]


def test_a_teacher_that_is_not_ahead_has_no_gap_to_close(sweep: Path):
    summary = json.loads((sweep / "summary.json").read_text())
    summary["teacher"]["test"] |= {"all": [0.69, 100], "colour": [0.752, 40]}
    change(sweep / "summary.json", **summary)
    page = page_of(sweep)
    assert "Gap to the teacher closed - The teacher is not ahead of labels only by half a point." in page.text
    assert page.row("losses=all", nth=1)[-2:] == ["-", "80"]


def test_curves_of_runs_that_are_gone_are_named_as_left_out(sweep: Path):
    shutil.rmtree(sweep / "runs" / "losses=all,train.seed=1")
    assert "1 of 6 runs are left out: their folders are gone." in page_of(sweep).text
    shutil.rmtree(sweep / "runs")
    text = page_of(sweep).text
    assert "No curves: the folders of all runs are gone, and their logs with them." in text
    assert "date not recorded" in text and "commit not recorded" in text
    assert "Date, commit, command and versions stand in the runs' folders, and none of these is left." in text


def test_gradient_shares_that_nobody_asked_for_are_named(tmp_path: Path):
    folder = write_sweep(tmp_path / "s", store=tmp_path, gradient_shares=False)
    page = page_of(folder)
    assert "The share of the gradient norm was not logged: no run set log_gradient_shares: true." in page.text
    assert not [a for _, a in page.tags if "share of gradient" in a.get("aria-label", "")]


def test_variations_beyond_the_colours_are_named_and_not_drawn(tmp_path: Path):
    names = ("none", *(f"v{number}" for number in range(8)))
    text = page_of(write_sweep(tmp_path / "s", store=tmp_path, variations=names)).text
    assert "Not drawn, being beyond the eight that colours can tell apart: losses=v7." in text
    assert "one thin line for each of 16 runs" in text


def test_a_store_that_is_gone_or_does_not_know_its_time_is_named(sweep: Path, tmp_path: Path):
    store = tmp_path / "teacher.zarr"
    for record in store.glob("parts/*/part.json"):
        assert "seconds" in record.read_text()
    shutil.rmtree(store)
    text = page_of(sweep).text
    assert "Its cost is not known. The store cannot be read now: No teacher store at" in text
    assert "Teacher time saved - Not known: the store cannot be read." in text


def test_a_store_without_times_has_a_cost_and_no_saving(tmp_path: Path):
    from small_store import write_store

    text = page_of(write_sweep(tmp_path / "s", store=write_store(tmp_path / "old.zarr"))).text
    assert "not recorded: the store was made by a version that did not time its parts" in text
    assert (
        "Teacher time saved by reruns: Not known: the store does not say how long the teacher took." in text
    )


def test_a_run_alone_says_what_it_lacks(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": str(store)}})
    text = page_of(tmp_path / "run").text
    assert "Accuracy - Not measured: no held-out questions were answered." in text
    assert "Nothing was evaluated: there are no answers to held-out questions in this folder." in text
    assert "Teacher time saved - No run here reads the teacher." in text
    assert 'Threads: "-", since only a sweep records them.' in text


def test_a_run_that_does_not_say_how_fast_it_was_is_named(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised", "logits"], config={"cache": {"path": str(store)}})
    state = tmp_path / "run" / "trainer_state.json"
    change(state, log_history=json.loads(state.read_text())["log_history"][:-1])
    page = page_of(tmp_path / "run")
    assert "Throughput - No run says how fast it trained." in page.text
    assert page.row("run") == ["run", "1", "-", "30", "-", "-", "-"]
    assert "Not known: not every run says how many samples it saw." in page.text


def test_a_run_that_answered_has_an_accuracy_and_no_gain(tmp_path: Path):
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": "nowhere"}})
    rest = {"group": "a", "question_type": "colour", "answer": "red", "correct": False, "test_set": "test"}
    answers = [{"key": str(n), "prediction": "red" if n else "blue", **rest} for n in range(4)]
    (tmp_path / "run" / "predictions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    page = page_of(tmp_path / "run")
    assert "Accuracy 75.00 % run, 4 questions of test. No gain: no labels-only run." in page.text
    assert page.row("run") == ["run", "1", "75.00"]


# Its numbers


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
