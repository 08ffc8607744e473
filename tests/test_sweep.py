"""The sweep: every run once, from one store; what is done stays done, and what fails stops nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from small_experiment import snapshot

import cli
from cache import FingerprintMismatch
from pipeline.config.config import load_config
from pipeline.distill.training.processes import alone_in
from pipeline.errors import ConfigError, PipelineError
from pipeline.sweep.lines import read_lines
from pipeline.sweep.run import run_sweep
from pipeline.sweep.variations import parse_vary, plan_runs

VARY = ("losses=none,all", "train.seed=0,1")


@pytest.fixture(scope="module")
def sweep_of(experiment):
    """Runs a sweep of the small experiment into a folder; returns lines, failures and what was said."""

    def run(folder, *overrides: str, vary=VARY, **options):
        base = [f"output_dir={folder}", *overrides]
        config = load_config(experiment.file, base)
        runs = plan_runs(lambda more: load_config(experiment.file, [*base, *more]), parse_vary(vary))
        said: list[str] = []
        with alone_in(folder):
            lines, failed = run_sweep(config, runs, folder, say=said.append, **options)
        return lines, failed, said

    return run


@pytest.fixture(scope="module")
def finished(sweep_of, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, *sweep_of(folder)


def test_a_run_leaves_one_line_of_json(finished):
    folder, lines, failed, said = finished
    assert not failed and len(said) == 5 and said[0].startswith("4 runs, 0 of them done; 1 at a time")
    assert read_lines(folder) == list(lines.values())
    line = lines["losses=all,train.seed=1"]
    assert line["values"] == {"losses": "all", "train.seed": 1}
    assert line["baseline"] == "losses=none,train.seed=1"
    assert sorted(line["terms"]) == ["attention", "logits", "supervised", "vision_all", "vision_focus"]
    assert (line["steps"], line["samples_seen"]) == (2, 8)
    assert line["accuracy"]["test"]["all"][1] == 6
    state = json.loads((folder / line["folder"] / "trainer_state.json").read_text())
    assert line["train_seconds"] == state["log_history"][-1]["train_runtime"]


def test_a_finished_sweep_does_nothing_again(finished, sweep_of):
    folder, lines, _, _ = finished
    before = {name: kept for name, kept in snapshot(folder / "runs").items()}
    again, failed, said = sweep_of(folder)
    assert again == lines and not failed and said == [f"4 runs, 4 of them done; 1 at a time -> {folder}"]
    assert snapshot(folder / "runs") == before


def test_a_wider_sweep_runs_only_what_is_new(finished, sweep_of, tmp_path):
    folder = tmp_path / "wider"
    sweep_of(folder, vary=["losses=none", "train.seed=0"])
    _, _, said = sweep_of(folder, vary=["losses=none,logits", "train.seed=0"])
    assert [line.split(":")[0] for line in said[1:]] == ["[2/2] losses=logits,train.seed=0"]
    narrow, _, said = sweep_of(folder, vary=["losses=none", "train.seed=0"])
    assert list(narrow) == ["losses=none,train.seed=0"] and len(said) == 1
    assert len(read_lines(folder)) == 2


def test_other_settings_replace_a_run_only_if_that_is_asked_for(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    first, _, _ = sweep_of(tmp_path, vary=vary)
    before, lines = snapshot(tmp_path / "runs"), read_lines(tmp_path)
    with pytest.raises(
        PipelineError, match=r"1 of these runs made with other .*such as losses=none,train.seed=0; "
    ):
        sweep_of(tmp_path, "train.learning_rate=0.1", vary=vary)
    assert snapshot(tmp_path / "runs") == before and read_lines(tmp_path) == lines
    second, _, said = sweep_of(tmp_path, "train.learning_rate=0.1", vary=vary, overwrite=True)
    assert len(said) == 2 and len(read_lines(tmp_path)) == 1
    assert first["losses=none,train.seed=0"]["identity"] != second["losses=none,train.seed=0"]["identity"]


def test_a_line_that_is_gone_is_written_again_without_training(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0,1"]
    lines, _, _ = sweep_of(tmp_path, vary=vary)
    model = snapshot(tmp_path / "runs")
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    again, _, said = sweep_of(tmp_path, vary=vary)
    assert again == lines and len(said) == 2 and read_lines(tmp_path) == list(lines.values())
    assert snapshot(tmp_path / "runs") == model


def test_a_finished_run_without_its_line_is_replaced_only_if_asked(sweep_of, tmp_path):
    """A kill came between the training and the line, and other settings are asked for now."""
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, vary=vary)
    (tmp_path / "runs.jsonl").unlink()
    model = tmp_path / "runs" / "losses=none,train.seed=0" / "model" / "model.safetensors"
    good = model.read_bytes()
    for mark in ("kept", "lost"):
        if mark == "lost":
            (model.parent.parent / "finished.json").unlink()
        lines, failed, _ = sweep_of(tmp_path, "train.learning_rate=0.1", vary=vary)
        assert not lines and "--overwrite" in failed["losses=none,train.seed=0"]
        assert model.read_bytes() == good
    lines, failed, _ = sweep_of(tmp_path, "train.learning_rate=0.1", vary=vary, overwrite=True)
    assert lines and not failed and model.read_bytes() != good


def test_a_run_that_a_kill_cut_short_is_trained_anew(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, vary=vary)
    run = tmp_path / "runs" / "losses=none,train.seed=0"
    for file in (tmp_path / "runs.jsonl", run / "finished.json", run / "trainer_state.json"):
        file.unlink()
    lines, failed, _ = sweep_of(tmp_path, vary=vary)
    assert lines and not failed


def test_models_that_a_sweep_reads_lie_outside_it(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, vary=vary)
    before = snapshot(tmp_path / "runs")
    student = tmp_path / "runs" / "losses=none,train.seed=0" / "model"
    with pytest.raises(PipelineError, match=r"student\.model .* lies among the model and checkpoints of"):
        sweep_of(tmp_path, f"student.model={student}", vary=vary, overwrite=True, keep_models=False)
    assert snapshot(tmp_path / "runs") == before


def test_a_damaged_line_is_named(sweep_of, tmp_path):
    sweep_of(tmp_path, vary=["losses=none", "train.seed=0"])
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text() + '{"name": "losses=none"}\n')
    with pytest.raises(PipelineError, match=r"runs\.jsonl: line 2 is not a run; remove it to run it again"):
        sweep_of(tmp_path, vary=["losses=none", "train.seed=0"])


def test_lines_made_with_other_settings_stay_until_they_are_replaced(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    first, _, _ = sweep_of(tmp_path, vary=vary)
    lines, failed, said = sweep_of(
        tmp_path, "train.learning_rate=1e30", "train.max_steps=4", vary=vary, overwrite=True
    )
    assert not lines and failed and "1 made with other settings and to be replaced" in said[0]
    assert read_lines(tmp_path) == list(first.values())


def test_how_a_run_is_logged_or_cut_up_makes_no_other_run(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, vary=vary)
    logged = ["train.logging_steps=2", "train.save_strategy=epoch"]
    halves = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    for settings in (logged, halves, ["train.dataloader_num_workers=1"]):
        assert len(sweep_of(tmp_path, *settings, vary=vary)[2]) == 1
    with pytest.raises(PipelineError, match="made with other settings"):
        sweep_of(tmp_path, "train.per_device_train_batch_size=2", vary=vary)


def test_a_line_of_another_identity_is_written_anew_from_the_training_that_is_there(sweep_of, tmp_path):
    """As after an update that counts other things into an identity: nothing is trained again."""
    vary = ["losses=none", "train.seed=0"]
    lines, _, _ = sweep_of(tmp_path, vary=vary)
    file, models = tmp_path / "runs.jsonl", snapshot(tmp_path / "runs")
    file.write_text(file.read_text().replace(next(iter(lines.values()))["identity"], "an earlier version's"))
    again, failed, _ = sweep_of(tmp_path, vary=vary, overwrite=True)
    assert again == lines and not failed and snapshot(tmp_path / "runs") == models


def test_two_sweeps_do_not_share_a_folder(experiment, tmp_path, capsys):
    lock = tmp_path / "lock"
    holder = (
        f"import fcntl; file = open({str(lock)!r}, 'w')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held'); input()"
    )
    command = [sys.executable, "-u", "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(SystemExit):
            cli.main(["sweep", "--config", str(experiment.file), "--output", str(tmp_path)])
        process.communicate("\n")
    said = capsys.readouterr().err
    assert f"{tmp_path}: another process is training there; wait for it, or give another --output" in said
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_a_run_that_fails_is_told_and_the_others_go_on(sweep_of, tmp_path):
    vary = ["losses=logits", "train.learning_rate=1e-3,1e30"]
    lines, failed, said = sweep_of(tmp_path, "train.max_steps=4", vary=vary)
    assert "losses=logits,train.learning_rate=0.001" in lines
    (name,) = {name for name in failed if "logits" in name}
    assert name == "losses=logits,train.learning_rate=1e+30" and "NonFiniteLossError" in failed[name]
    assert any(line.startswith(f"FAILED {name}: ") for line in said)


def test_several_at_a_time_say_the_same_and_keep_their_own_logs(finished, sweep_of, tmp_path):
    _, alone, _, _ = finished
    lines, failed, _ = sweep_of(tmp_path, jobs=2)
    assert not failed and list(lines) == list(alone)
    for name, line in lines.items():
        assert (line["terms"], line["accuracy"]) == (alone[name]["terms"], alone[name]["accuracy"])
        assert "loss" in (tmp_path / line["folder"] / "log.txt").read_text()


def test_a_sweep_whose_folders_are_deleted_is_still_done(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    lines, _, _ = sweep_of(tmp_path, vary=vary)
    shutil.rmtree(tmp_path / "runs")
    again, _, said = sweep_of(tmp_path, vary=vary)
    assert again == lines and len(said) == 1 and not (tmp_path / "runs").exists()


def test_weights_can_be_discarded_and_the_run_is_still_done(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, "train.save_strategy=epoch", vary=vary, keep_models=False)
    assert not list(tmp_path.rglob("*.safetensors")) and list(tmp_path.rglob("predictions.jsonl"))
    assert len(sweep_of(tmp_path, vary=vary)[2]) == 1
    (tmp_path / "runs.jsonl").unlink()
    lines, failed, _ = sweep_of(tmp_path, vary=vary)  # without weights it is trained again
    assert lines and not failed


def test_weights_that_a_kill_left_behind_are_discarded_by_the_next_sweep(sweep_of, tmp_path):
    vary = ["losses=none", "train.seed=0"]
    sweep_of(tmp_path, vary=vary)
    assert list(tmp_path.rglob("*.safetensors"))
    assert len(sweep_of(tmp_path, vary=vary, keep_models=False)[2]) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_sweep_that_begins_takes_the_summary_of_the_one_before_away(finished, sweep_of, tmp_path):
    folder, lines, _, _ = finished
    (tmp_path / "summary.json").write_text("{}")
    _, failed, _ = sweep_of(tmp_path, "train.learning_rate=1e30", "train.max_steps=4", vary=["losses=none"])
    assert failed and not (tmp_path / "summary.json").exists()
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    assert runs == {name: line["identity"] for name, line in lines.items()}


def test_a_resumed_run_counts_the_samples_of_all_its_steps(sweep_of, tmp_path):
    vary, longer = ["losses=none", "train.seed=0"], ["train.max_steps=4", "train.save_steps=2"]
    saving = [*longer, "train.save_strategy=steps", "train.resume_from_checkpoint=true"]
    sweep_of(tmp_path, *saving, vary=vary)
    folder = tmp_path / "runs" / "losses=none,train.seed=0"
    for name in ("finished.json", "checkpoint-4/trainer_state.json"):
        (folder / name).unlink()
    (tmp_path / "runs.jsonl").unlink()
    lines, _, _ = sweep_of(tmp_path, *saving, vary=vary)
    assert lines["losses=none,train.seed=0"]["samples_seen"] == 16


def test_a_sweep_without_held_out_questions_is_refused(sweep_of, tmp_path):
    with pytest.raises(ConfigError, match=r"name held-out shards as evaluate\.shards"):
        sweep_of(tmp_path, "evaluate=null")


def test_another_store_is_refused_before_the_first_run(sweep_of, tmp_path):
    with pytest.raises(FingerprintMismatch):
        sweep_of(tmp_path, "data.template=plain")
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
