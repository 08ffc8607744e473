"""The page of a report: it needs nothing but itself, escapes what it is given and names what is not there."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from parsed_page import Page, page_of
from small_sweep import change, write_run, write_sweep, write_timed_store

from pipeline.report.curve_panels import draw_curves
from pipeline.report.curves import kind_for
from pipeline.report.gather import gather
from pipeline.report.page import render_page, write_report

pytestmark = pytest.mark.slow  # each draws a page

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))


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
    shipped = project["tool"]["setuptools"]["package-data"]["pipeline.report"]
    assert all((ROOT / "pipeline" / "report" / name).is_file() for name in shipped)
    assert "page.html.j2" in shipped


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
        "Teacher time saved 3.15 min An estimate: an online teacher for 4 runs, minus stage 1 once (3 s)."
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
    texts = " ".join(page.text.split())
    assert "optimizer step" in texts and "weight × loss, nats" in texts and "loss, mean square" in texts
    assert "losses=all, losses=attention and losses=none coincide." in texts
    assert (
        "one thin line for each of 6 runs; all seeds of a variation have one colour, labels only is dashed."
        in page.text
    )


def test_the_estimate_of_the_time_saved_shows_its_numbers(sweep: Path):
    text = page_of(sweep).text
    assert "The 4 runs that read the teacher saw 384 samples together." in text
    assert (
        "3.2 min in all at stage 1's speed. The cache took 3 s once. Saved: 3.15 min of the teacher's time."
        in text
    )
    assert (
        "An estimate, not a measurement: samples seen × (stage 1's time / samples cached) − stage 1's time."
        in text
    )
    assert "3 s for stage 1, 500 ms per sample" in text and "each stored once for 1.50 uses" in text


def test_a_cache_that_has_not_paid_back_says_so(tmp_path: Path):
    store = write_timed_store(tmp_path / "teacher.zarr")
    write_run(tmp_path / "run", ["supervised", "logits"], config={"cache": {"path": str(store)}})
    state = tmp_path / "run" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    log[-1] |= {"train_runtime": 2.0, "samples_seen": 4}
    change(state, log_history=log)
    text = page_of(tmp_path / "run").text
    assert "The run that reads the teacher saw 4 samples." in text
    assert "Not paid back yet: the cache took 1 s more than an online teacher for these runs." in text
    assert "Teacher time saved −1 s" in text and "Stage 1 has not paid back yet." in text


def test_held_out_losses_are_rings_at_their_steps_in_the_panel_of_their_term(tmp_path: Path):
    write_run(tmp_path / "run", ["supervised", "logits"], config={"cache": {"path": "nowhere"}})
    said = "Rings are held-out samples, which no step trains on."
    before = page_of(tmp_path / "run")
    assert said not in before.text
    state = tmp_path / "run" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    for step in (15, 30):
        log.insert(-1, {"step": step, "eval_loss": 9.0, "eval_supervised": 3.0, "eval_runtime": 1.0})
    change(state, log_history=log)
    [run] = gather(tmp_path / "run").runs
    held_out = [
        (entry["step"], entry["held_out/supervised"])
        for entry in run.history or ()
        if "held_out/supervised" in entry
    ]
    assert held_out == [(15, 3.0), (30, 3.0)] and "held_out/logits" not in str(run.history)
    page = page_of(tmp_path / "run")
    assert said in page.text
    rings = [
        sum(tag == "use" and "series-1" in attributes.get("style", "") for tag, attributes in found.tags)
        for found in (before, page)
    ]
    assert rings == [0, 2]


def test_what_is_observed_beside_a_loss_has_a_panel_and_held_out_rewards_are_its_rings(tmp_path: Path):
    """A policy's held-out loss is minus the reward: it has no place on the axis of the losses of steps."""
    write_run(tmp_path / "run", ["policy"], config={"cache": {"path": "nowhere"}})
    state = tmp_path / "run" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    for entry in [entry for entry in log if "loss" in entry]:
        entry |= {"policy/reward": -0.5, "policy/overlap": 0.25}
    log.insert(-1, {"step": 15, "eval_policy": 7.0, "eval_policy/reward": -7.0, "eval_policy/overlap": 1.0})
    change(state, log_history=log)
    findings = gather(tmp_path / "run")
    curves = draw_curves(findings)
    assert list(curves["rows"]) == ["policy", "policy/overlap", "policy/reward"] and curves["held_out"]
    [reward] = curves["rows"]["policy/reward"]
    assert reward.kind == "observed" and "log probability, nats" in reward.svg
    rings = {
        name: sum("<use" in panel.svg and "series-1" in panel.svg for panel in panels)
        for name, panels in curves["rows"].items()
    }
    assert rings == {"policy": 0, "policy/overlap": 0, "policy/reward": 1}
    assert "policy/reward" in page_of(tmp_path / "run").text


def test_losses_far_below_zero_are_not_drawn_on_a_logarithmic_axis():
    assert kind_for([[100.0, 1.0, 1.0, -2.0]]) == "linear"
    assert kind_for([[100.0, 1.0, 1.0, -0.5]]) == "log"  # a little noise around zero hides no curve


def test_the_config_stands_in_the_page(sweep: Path):
    assert "output_dir: runs/sweep" in page_of(sweep).text
