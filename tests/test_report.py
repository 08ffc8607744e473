"""The numbers of a report: of a sweep by hand, of small real trainings, and what is said where one is missing."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from small_experiment import Experiment
from small_sweep import SAMPLES_SEEN, STEPS, change, write_run, write_sweep, write_timed_store

from cache import summarise
from pipeline.config.config import load_config
from pipeline.distill.training.processes import alone_in
from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Answered, paired_gain
from pipeline.evaluation.experiment import BASELINE, DISTILLED, run_experiment
from pipeline.evaluation.predictions import accuracy_by_type, read_predictions
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.report.cost import StoreCost
from pipeline.report.findings import Findings, gap_closed
from pipeline.report.gather import gather
from pipeline.report.page import render_page
from pipeline.sweep.lines import keep_teacher
from pipeline.sweep.run import run_sweep
from pipeline.sweep.summary import summarise_sweep
from pipeline.sweep.variations import parse_vary, plan_runs

pytestmark = pytest.mark.slow


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))


@pytest.fixture(scope="module")
def trained(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment's folder: teacher evaluated, both students trained for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    config = experiment.config(folder, "baseline=true", "log_gradient_shares=true")
    evaluate_checkpoint(config, config.teacher.model)
    run_experiment(config, say=lambda line: None)
    return folder


# A sweep


def test_the_results_are_the_summarys_in_its_order(sweep: Path):
    findings = gather(sweep)
    assert (findings.kind, findings.name) == ("sweep", "sweep")
    assert [result.label for result in findings.results] == ["losses=all", "losses=attention", "losses=none"]
    first = findings.results[0]
    assert first.accuracy == pytest.approx(0.87) and first.by_seed == pytest.approx((0.89, 0.85))
    assert first.gain is not None and first.gain.difference == pytest.approx(0.18)
    assert (first.gain.num_images, first.gain.num_seeds, first.num_questions) == (20, 2, 100)
    assert [result.is_baseline for result in findings.results] == [False, False, True]


def test_the_gap_is_closed_by_question_type_towards_the_teacher(sweep: Path):
    best, attention, none = gather(sweep).results
    # All: from 0.69 towards 0.94, reached 0.87; colour: 0.75, 1 and 0.90; yes/no: 0.65, 0.90 and 0.85.
    assert best.gap_closed == pytest.approx(0.72)
    assert best.gap_by_type == pytest.approx({"colour": 0.6, "yes/no": 0.8})
    assert attention.gap_by_type == pytest.approx({"colour": 0.4, "yes/no": 0.4})
    assert none.gap_closed is None and none.gap_by_type == {}


def test_a_gap_of_less_than_half_a_point_is_not_divided_by():
    assert gap_closed(0.92, 0.90, 0.94) == pytest.approx(0.5)
    assert gap_closed(0.9, 0.9, 0.905) == 0.0
    assert gap_closed(0.9, 0.9, 0.9049) is None and gap_closed(0.9, 0.95, 0.9) is None


def test_a_summary_that_divided_by_less_is_not_believed(sweep: Path):
    summary = json.loads((sweep / "summary.json").read_text())
    summary["teacher"]["test"]["all"] = [0.693, 100]
    summary["rows"][0]["gap_closed"] = 60.0
    change(sweep / "summary.json", **summary)
    assert gather(sweep).results[0].gap_closed is None


def test_a_teacher_that_was_asked_another_number_of_questions_closes_no_gap(sweep: Path):
    summary = json.loads((sweep / "summary.json").read_text())
    summary["teacher"]["test"]["all"] = [0.94, 99]
    change(sweep / "summary.json", **summary)
    assert [(r.gap_closed, r.gap_by_type) for r in gather(sweep).results] == [(None, {})] * 3


def test_a_sweep_without_a_teacher_says_so(sweep: Path):
    change(sweep / "summary.json", teacher=None)
    findings = gather(sweep)
    assert findings.teacher == {} and "`alignkd evaluate`" in findings.teacher_absent
    assert [result.gap_by_type for result in findings.results] == [{}, {}, {}]


def test_the_runs_are_the_sweeps_own_lines_with_their_logs(sweep: Path):
    runs = gather(sweep).runs
    assert len(runs) == 6 and runs[0].name == "losses=all,train.seed=0"
    assert runs[0].terms == ("supervised", "attention", "vision_all") and runs[0].reads_teacher
    assert not runs[-1].reads_teacher
    second = runs[1]
    assert (second.steps, second.samples_seen, second.threads) == (STEPS, SAMPLES_SEEN, 1)
    assert (second.train_seconds, second.samples_per_second) == (49.0, 3.0)
    assert runs[0].history is not None and [entry["step"] for entry in runs[0].history] == [10, 20, 30]
    assert runs[0].history[0]["loss/attention"] == 2.0 and "loss" not in runs[0].history[0]


def test_a_run_whose_folder_is_gone_keeps_its_numbers_and_loses_its_curve(sweep: Path):
    shutil.rmtree(sweep / "runs" / "losses=all,train.seed=1")
    runs = gather(sweep).runs
    assert runs[1].history is None and runs[1].samples_seen == SAMPLES_SEEN
    assert [run.history is None for run in runs].count(True) == 1


def test_what_was_varied_and_asked_is_read_off_the_runs(sweep: Path):
    findings = gather(sweep)
    assert findings.varied == {"losses": ["all", "attention", "none"], "train.seed": [0, 1]}
    assert findings.questions == {"test": {"colour": 40, "yes/no": 60, "all": 100}}


def test_a_run_made_with_other_settings_is_none_of_the_sweep(sweep: Path):
    runs = json.loads((sweep / "sweep.json").read_text())["runs"]
    change(sweep / "sweep.json", runs=runs | {"losses=all,train.seed=1": "of other settings"})
    assert "losses=all,train.seed=1" not in [run.name for run in gather(sweep).runs]
    change(sweep / "sweep.json", runs={name: "of other settings" for name in runs})
    with pytest.raises(PipelineError, match=r"has no run of it; run `alignkd sweep` again"):
        gather(sweep)


def test_runs_of_an_earlier_sweep_into_the_same_folder_are_not_counted(sweep: Path):
    kept = [f"losses={name},train.seed=0" for name in ("all", "attention", "none")]
    runs = json.loads((sweep / "sweep.json").read_text())["runs"]
    change(sweep / "sweep.json", runs={name: runs[name] for name in kept})
    findings = gather(sweep)
    assert [run.name for run in findings.runs] == kept
    assert findings.store is not None and findings.store.samples_seen == 2 * SAMPLES_SEEN


def test_the_origin_is_that_of_the_runs_else_of_the_sweep(sweep: Path):
    assert gather(sweep).origin.commits == ("0123456789abcdef",)
    shutil.rmtree(sweep / "runs")
    assert gather(sweep).origin.created == ""
    made = {
        "created": "2025-01-02T03:04:05+00:00",
        "git_commit": "",
        "command": "alignkd sweep",
        "versions": {},
    }
    change(sweep / "sweep.json", provenance=made)
    origin = gather(sweep).origin
    assert origin.created == "2025-01-02T03:04:05+00:00" and origin.commits == ()


# The cache


def test_the_teacher_time_saved_is_what_every_run_would_have_forwarded_less_stage_1(
    sweep: Path, tmp_path: Path
):
    store = gather(sweep).store
    assert store is not None
    assert (store.store.teacher_seconds, store.store.samples, store.num_runs) == (3.0, 6, 4)
    # Four runs read the teacher, 96 samples each, at half a second a sample; the two on labels alone do not.
    assert store.samples_seen == 384 and store.online_seconds == 192.0 and store.saved_seconds == 189.0
    assert store.store == summarise(tmp_path / "teacher.zarr") and store.store.dedupe_factor == 1.5


def test_a_store_that_does_not_say_how_long_it_took_saves_an_unknown_time(tmp_path: Path):
    store = replace(summarise(write_timed_store(tmp_path / "teacher.zarr")), teacher_seconds=None)
    cost = StoreCost(store, num_runs=1, samples_seen=100)
    assert cost.online_seconds is None and cost.saved_seconds is None


def test_a_cache_that_one_short_run_used_has_not_paid_back(tmp_path: Path):
    store = summarise(write_timed_store(tmp_path / "teacher.zarr"))
    assert StoreCost(store, num_runs=1, samples_seen=2).saved_seconds == -2.0


def test_a_store_that_is_gone_is_named_with_the_stores_own_words(sweep: Path, tmp_path: Path):
    shutil.rmtree(tmp_path / "teacher.zarr")
    findings = gather(sweep)
    assert findings.store is None
    assert findings.store_absent.startswith(f"The store cannot be read now: No teacher store at {tmp_path}")


def test_runs_of_several_stores_have_no_one_cost(sweep: Path):
    lines = [json.loads(line) for line in (sweep / "runs.jsonl").read_text().splitlines()]
    for line in lines:
        line["values"]["cache.path"] = line["values"]["losses"]
    summary = json.loads((sweep / "summary.json").read_text())
    for row in summary["rows"]:
        row["variation"]["cache.path"] = row["variation"]["losses"]
    change(sweep / "summary.json", **summary)
    (sweep / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "cache.path was varied" in gather(sweep).store_absent


def test_runs_of_a_mixture_of_stores_have_no_one_cost(sweep: Path):
    of_sweep = json.loads((sweep / "sweep.json").read_text())
    of_sweep["config"] |= {"cache": None, "caches": [{"path": "a.zarr"}, {"path": "b.zarr"}]}
    (sweep / "sweep.json").write_text(json.dumps(of_sweep))
    assert gather(sweep).store_absent.startswith("The runs read several stores (caches)")


# Real trainings


def test_an_experiment_is_both_students_with_the_gain_of_the_paired_bootstrap(trained: Path):
    findings = gather(trained)
    assert findings.kind == "experiment" and findings.labels() == [DISTILLED, BASELINE]
    ours, theirs = (read_predictions(trained / n / "predictions.jsonl") for n in ("align_kd", "supervised"))
    distilled, labels_only = findings.results
    assert (
        distilled.gain == paired_gain([Answered.of(ours)], [Answered.of(theirs)]) and labels_only.gain is None
    )
    assert distilled.accuracy == accuracy_by_type(ours)["all"][0] and labels_only.is_baseline
    assert findings.teacher["test"]["all"][1] == distilled.num_questions == 6
    assert findings.questions["test"] == {"all": 6, "all questions": 1, "colour": 2, "shape": 1, "yes/no": 2}


def test_an_experiment_has_real_curves_and_throughput(trained: Path):
    distilled, labels_only = gather(trained).runs
    assert distilled.terms == ("supervised", "attention", "vision_all", "vision_focus", "logits")
    assert labels_only.terms == ("supervised",) and not labels_only.reads_teacher
    assert distilled.history is not None and [entry["step"] for entry in distilled.history] == [1, 2]
    shares = [v for key, v in distilled.history[-1].items() if key.startswith("gradient_share/")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1)
    assert (distilled.steps, distilled.samples_seen, distilled.threads) == (2, 8, None)
    assert distilled.train_seconds and distilled.samples_per_second


def test_an_experiment_knows_its_config_origin_and_store(trained: Path, experiment: Experiment):
    findings = gather(trained)
    assert findings.config["cache"]["path"] == str(experiment.store)
    assert findings.origin.created and findings.origin.versions["torch"]
    assert findings.store is not None and findings.store.store.samples == summarise(experiment.store).samples
    assert findings.store.num_runs == 1 and findings.store.samples_seen == 8


def test_a_single_run_finds_the_teacher_of_its_experiment(trained: Path):
    assert gather(trained / "align_kd").teacher == gather(trained).teacher != {}


def test_a_single_run_has_no_gain_and_no_teacher(trained: Path, tmp_path: Path):
    findings = gather(Path(shutil.copytree(trained / "align_kd", tmp_path / "align_kd")))
    assert (findings.kind, findings.name, len(findings.runs)) == ("run", "align_kd", 1)
    [result] = findings.results
    assert result.gain is None and result.gap_closed is None and not result.is_baseline
    assert "The teacher was not evaluated" in findings.teacher_absent


def test_a_run_that_answered_nothing_has_curves_only(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "align_kd", tmp_path / "run")
    (tmp_path / "run" / "predictions.jsonl").unlink()
    findings = gather(tmp_path / "run")
    assert findings.results == () and findings.test_sets() == [] and findings.labels() == ["run"]


def test_a_teacher_that_answered_other_questions_is_left_out_with_a_reason(trained: Path, tmp_path: Path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    answers = (copy / "teacher" / "predictions.jsonl").read_text().splitlines()
    (copy / "teacher" / "predictions.jsonl").write_text("\n".join(answers[:-1]) + "\n")
    findings = gather(copy)
    assert findings.teacher == {} and "answers other questions than the students" in findings.teacher_absent


def test_a_real_sweep_is_read_as_it_is_written(experiment: Experiment, tmp_path: Path):
    base = [f"output_dir={tmp_path}", "losses.attention=null"]
    config = load_config(experiment.file, base)
    vary = parse_vary(["losses=none,logits", "train.seed=0,1"])
    runs = plan_runs(lambda more: load_config(experiment.file, [*base, *more]), vary)
    with alone_in(tmp_path / "sweep"):
        lines, _ = run_sweep(config, runs, tmp_path / "sweep", say=lambda line: None)
    teacher = evaluate_checkpoint(config, config.teacher.model)
    keep_teacher(tmp_path / "sweep", teacher)
    summary = summarise_sweep(tmp_path / "sweep", lines)
    findings = gather(tmp_path / "sweep")
    assert [result.label for result in findings.results] == ["losses=none", "losses=logits"]
    assert [result.is_baseline for result in findings.results] == [True, False]
    gain = findings.results[1].gain
    assert gain is not None and asdict(gain) == summary["rows"][1]["gain"] and gain.num_seeds == 2
    assert findings.results[1].by_seed == tuple(summary["rows"][1]["accuracy_by_seed"])
    assert dict(findings.teacher["test"]) == accuracy_by_type(teacher)
    assert [(run.label, run.terms) for run in findings.runs] == [
        ("losses=none", ("supervised",)),
        ("losses=logits", ("supervised", "logits")),
    ] * 2
    assert all(run.history and run.samples_seen == 8 and run.threads == 1 for run in findings.runs)
    assert findings.store is not None and (findings.store.num_runs, findings.store.samples_seen) == (2, 16)
    assert findings.origin.created and findings.varied == {"losses": ["none", "logits"], "train.seed": [0, 1]}
    assert render_page(findings)


def test_a_run_without_throughput_has_none(tmp_path: Path):
    write_run(tmp_path / "run", ["supervised"], config={"cache": {"path": "nowhere"}})
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    change(tmp_path / "run" / "trainer_state.json", log_history=state["log_history"][:-1])
    findings: Findings = gather(tmp_path / "run")
    assert findings.runs[0].samples_seen is None and findings.runs[0].samples_per_second is None
