"""A store and a checkpoint that an earlier version wrote are read, and used, as they were then."""

from __future__ import annotations

import json
import shutil

import golden_experiment
import numpy as np
import pytest
from golden_experiment import FOLDER
from small_experiment import log_of, losses_of_steps

from cache import FingerprintMismatch, Store, verify
from cli import main
from pipeline.config.config import load_config
from pipeline.distill.student import train_student
from pipeline.inspection.sample import inspect_sample
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.check import check_store

EXPECTED_SAMPLES = 5
EXPECTED = json.loads((FOLDER / golden_experiment.EXPECTED).read_text())


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the folder, which is the working directory: its config has relative paths."""
    folder = shutil.copytree(FOLDER, tmp_path / "experiment")
    monkeypatch.chdir(folder)
    return folder


def test_the_store_says_what_it_said():
    assert golden_experiment.store_facts(FOLDER / "store") == EXPECTED["store"]


def test_the_store_has_no_fault():
    report = verify(FOLDER / "store", deep=True)
    assert report.problems == ()


def test_the_store_holds_the_same_values():
    stored, expected = (
        golden_experiment.stored_arrays(FOLDER / "store"),
        np.load(FOLDER / "expected_arrays.npz"),
    )
    assert stored.keys() == set(expected)
    for name, array in stored.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.slow
def test_stage_2_trains_from_the_store(copy):
    config = load_config(copy / "config.yaml", ["output_dir=fresh"])
    train_student(config, copy / "fresh")
    assert_close(losses_of_steps(copy / "fresh"), EXPECTED["losses"])


@pytest.mark.slow
def test_stage_2_resumes_from_the_checkpoint(copy):
    config = load_config(copy / "config.yaml", ["train.resume_from_checkpoint=true"])
    assert not (copy / "run" / "model").exists()
    train_student(config, copy / "run")
    history = log_of(copy / "run")
    assert "train_runtime" in history[-1] and history[-1]["step"] == 2
    assert_close(losses_of_steps(copy / "run"), EXPECTED["losses"])


def test_the_checkpoint_generates_the_same_ids():
    assert golden_experiment.generate(FOLDER / "run" / "checkpoint-1") == EXPECTED["generated"]


def assert_close(losses, expected):
    """Compare the steps' loss terms; another version of torch may sum in another order."""
    assert len(losses) == len(expected)
    for mine, theirs in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_the_live_teacher_agrees_with_a_store_of_format_1(copy):
    """The teacher is random by its seed, so that it can be made again; its digest is in the fingerprint."""
    shutil.rmtree(copy / "student")
    golden_experiment._write_models()
    found = check_store(load_config(copy / "config.yaml"), num_samples=8, seed=0)
    assert Store("store").manifest.format_version == 1
    assert found.is_sound and found.samples == EXPECTED_SAMPLES and {loss.name for loss in found.losses}
    for loss in found.losses:
        assert loss.gradient_cosine > 0.99


@pytest.mark.slow
def test_stage_1_finds_a_finished_store_of_format_1_done(copy):
    shutil.rmtree(copy / "student")
    golden_experiment._write_models()
    run = cache_teacher(load_config(copy / "config.yaml"))
    assert (run.parts_written, run.parts_found, run.broken) == (0, 1, ())
    with pytest.raises(FingerprintMismatch, match=r"top_k"):
        cache_teacher(load_config(copy / "config.yaml", ["targets.logits.top_k=3"]))


@pytest.mark.slow
def test_the_manifest_of_a_store_of_format_1_is_restored_by_the_command_line(copy, capsys):
    shutil.rmtree(copy / "student")
    golden_experiment._write_models()
    before = Store("store").manifest.contents_digest()
    (copy / "store" / "manifest.json").unlink()
    with pytest.raises(SystemExit):
        main(["verify", "store", "--fix", "--config", "config.yaml"])
    assert Store("store").manifest.contents_digest() == before, capsys.readouterr()
    assert verify("store", deep=True).problems == ()


@pytest.mark.slow
def test_a_sample_of_a_store_of_format_1_can_be_inspected(copy):
    store = Store("store")
    config = load_config(copy / "config.yaml", ["teacher.model=gone"])
    for key in list(store.keys()):
        shown = inspect_sample("store", key, config=config)
        assert sum(shown.sizes) == len(shown.vision) and len(shown.images) == len(shown.sizes)
        assert all(
            block.shape[1:] == (len(shown.text), len(shown.vision)) for block in shown.attention.values()
        )
