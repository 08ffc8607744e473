"""`alignkd check`: a sound store passes with the errors that it states, another one does not."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.torch import save_file
from small_experiment import copy_of_teacher, rewrite_store, weights

import cli
from cache import FingerprintMismatch
from pipeline.models.mobilevlm.images import clip_processor
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.check import IDS, LOG_PROBS, _kl, _rank_errors, check_store


@pytest.fixture(scope="module")
def coded(experiment, tmp_path_factory):
    """A store with the lossy codecs, and its config."""
    folder = tmp_path_factory.mktemp("coded")
    codecs = ["targets.attention.codec=sqrt_uint8", "targets.vision.codec=fixed_point"]
    config = experiment.config(folder, f"cache.path={folder}/store", *codecs)
    cache_teacher(config)
    return config


def test_a_store_of_float32_is_what_the_teacher_says(experiment, tmp_path):
    found = check_store(experiment.config(tmp_path), num_samples=100, seed=0)
    assert found.is_sound and found.samples == 13 and not found.is_stub and found.dtype == "float32"
    errors = {array.name: array.max_error for array in found.arrays}
    assert set(errors) == {
        "attention/layer_0", "attention/layer_1", "vision", "logits/ids", "logits/log_probs", "logits/tail",
    }  # fmt: skip
    assert max(errors[name] for name in ("attention/layer_0", "attention/layer_1", "vision")) < 1e-5
    assert found.logits is not None and (found.logits.top1_agreement, found.logits.kl < 1e-4) == (1.0, True)
    assert {loss.name for loss in found.losses} == {"attention", "vision_all", "vision_focus", "logits"}
    for loss in found.losses:
        assert loss.stored == pytest.approx(loss.live, rel=1e-3) and loss.gradient_cosine > 0.9999


def test_lossy_codecs_are_within_the_error_that_they_state(coded):
    found = check_store(coded, num_samples=100, seed=0)
    arrays = {array.name: array for array in found.arrays}
    assert found.is_sound
    assert 0.1 < arrays["attention/layer_0"].of_limit <= 1 and 0.5 < arrays["vision"].of_limit <= 1
    assert arrays["vision"].stated_error.startswith("|error| <= ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attention/layer_1", lambda values: values[:, ::-1]),
        ("logits/ids", lambda values: values[:, ::-1]),
        ("logits/log_probs", lambda values: values - np.float32(0.25)),
    ],
)
def test_values_that_the_teacher_does_not_say_are_found(name, change, experiment, tmp_path):
    def change_one(key, arrays):
        values = arrays[name]
        if isinstance(values, list):
            return arrays | {name: [np.ascontiguousarray(change(block)) for block in values]}
        return arrays | {name: np.ascontiguousarray(change(values))}

    store = rewrite_store(experiment.store, tmp_path / "store", change_one)
    found = check_store(experiment.config(tmp_path, f"cache.path={store}"), num_samples=100, seed=0)
    assert not found.is_sound
    assert [array.name for array in found.arrays if array.of_limit > 1] == [name]


def test_where_no_logits_are_stored_a_stub_checks(experiment, tmp_path):
    without = ["targets.logits=null", "losses.logits=null", f"cache.path={tmp_path}/store"]
    config = experiment.config(tmp_path, *without)
    cache_teacher(config)
    found = check_store(config, num_samples=4, seed=1, with_losses=False)
    assert found.is_stub and found.is_sound and found.samples == 4 and found.logits is None
    assert found.losses == () and found.losses_absent == "not asked for"


def test_losses_of_a_student_that_reads_in_another_way_are_not_compared(experiment, tmp_path, capsys):
    student = shutil.copytree(experiment.student, tmp_path / "student")
    clip_processor(student, 56).save_pretrained(student)
    file = student / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5] * 3}))
    found = check_store(experiment.config(tmp_path, f"student.model={student}"), num_samples=4, seed=0)
    assert found.is_sound and found.arrays and found.losses == ()
    assert found.losses_absent == "the student reads text or images in another way than the teacher"
    assert run("check", experiment.store, "--samples", "1", f"student.model={student}") == 0
    assert f"losses: {found.losses_absent}" in capsys.readouterr().out


def test_large_top_k_are_compared_in_the_memory_of_a_few_copies():
    rng = np.random.default_rng(0)
    positions, top_k, vocab = 200, 500, 2000
    stored, live = (
        {
            IDS: np.stack([rng.permutation(vocab)[:top_k] for _ in range(positions)]).astype(np.int32),
            LOG_PROBS: np.log(rng.dirichlet(np.ones(top_k), positions)).astype(np.float32),
        }
        for _ in range(2)
    )
    tracemalloc.start()
    errors, kl = _rank_errors(stored, live), _kl(live, stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * live[LOG_PROBS].nbytes  # of K ids with each of K: 500 times as much
    for at in (0, positions - 1):
        known = dict(zip(live[IDS][at].tolist(), live[LOG_PROBS][at].tolist(), strict=True))
        found = [known.get(number, live[LOG_PROBS][at].min()) for number in stored[IDS][at].tolist()]
        assert errors[at] == pytest.approx(np.abs(live[LOG_PROBS][at] - np.array(found)), abs=1e-6)
        theirs = dict(zip(stored[IDS][at].tolist(), stored[LOG_PROBS][at].tolist(), strict=True))
        p, q = np.exp([(known[number], theirs[number]) for number in known if number in theirs]).T
        p, q = (np.append(x, 1 - x.sum()) for x in (p, q))
        assert kl[at] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)


def test_another_teacher_is_refused(experiment, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    tensors = weights(teacher)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FingerprintMismatch, match=r"teacher: [0-9a-f]{64} -> "):
        check_store(experiment.config(tmp_path, f"teacher.model={teacher}"), num_samples=1, seed=0)


def test_the_command_says_what_it_found_with_an_exit_code(experiment, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(experiment.store), "--samples", "5"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith(f"5 samples captured again with {experiment.teacher} in float32\n\narray")
    assert shown.endswith("\n\nevery value within its stated error\n")
    assert "the same likeliest token at 100.00%" in shown

    def change(key, arrays):
        return arrays | {"logits/tail": arrays["logits/tail"] - 1}

    store = rewrite_store(experiment.store, tmp_path / "store", change)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["check", str(store), "--json", "--no-losses"])
    assert stopped.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert all("cosine" in array for array in found["arrays"])
    assert not found["is_sound"]
    assert [array["name"] for array in found["arrays"] if array["of_limit"] > 1] == ["logits/tail"]


@pytest.fixture(scope="module")
def drawn(experiment, tmp_path_factory):
    """A store with draws from the tail of the logits, and its config."""
    folder = tmp_path_factory.mktemp("drawn")
    config = experiment.config(folder, f"cache.path={folder}/store", "targets.logits.tail_samples=5")
    cache_teacher(config)
    return config


def test_draws_of_the_tail_are_compared_where_both_drew_the_same(drawn):
    found = check_store(drawn, num_samples=100, seed=0)
    arrays = {array.name: array for array in found.arrays}
    assert found.is_sound and arrays["logits/draw_ids"].agreement == 1.0
    assert 0 < arrays["logits/draw_log_probs"].of_limit <= 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits/draw_ids", lambda arrays: arrays["logits/ids"][:, :5]),
        ("logits/draw_log_probs", lambda arrays: arrays["logits/draw_log_probs"] - np.float32(0.25)),
    ],
)
def test_draws_that_are_no_draws_of_the_tail_are_found(name, change, drawn, tmp_path):
    store = rewrite_store(
        drawn.one_cache.path,
        tmp_path / "store",
        lambda key, arrays: arrays | {name: np.ascontiguousarray(change(arrays))},
    )
    here = drawn.one_cache.model_copy(update={"path": str(store)})
    found = check_store(drawn.model_copy(update={"cache": here}), num_samples=100, seed=0)
    assert not found.is_sound
    assert [array.name for array in found.arrays if array.of_limit > 1] == [name]


@pytest.fixture
def moved(experiment, tmp_path):
    """The store's teacher and shards at another place, as on another machine: nothing is where stage 1 had it."""
    teacher = copy_of_teacher(experiment, tmp_path / "elsewhere")
    arrays = rewrite_store(experiment.store, tmp_path / "store")
    return arrays, f"teacher.model={teacher}"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_the_command_takes_overrides_of_the_config_and_of_the_one_that_the_store_carries(
    experiment, moved, tmp_path, capsys
):
    store, here = moved
    for config in (["--config", experiment.file, f"output_dir={tmp_path}"], []):
        assert run("check", store, "--samples", "1", "--no-losses", *config, here) == 0
        assert capsys.readouterr().out.startswith(
            f"1 samples captured again with {tmp_path}/elsewhere in float32"
        )
    assert run("check", store, "teacher.modle=x") == 2
    said = capsys.readouterr().err
    assert f"config of {store}:\n  teacher.modle: unknown key; did you mean 'model'?" in said


def test_other_commands_that_take_a_config_take_overrides_too(experiment, moved, tmp_path, capsys):
    store, here = moved
    shutil.rmtree(store / "parts" / "shard-000001")
    config = ["--config", experiment.file, f"output_dir={tmp_path}", f"cache.path={store}", here]
    assert run("verify", store, "--fix", *config) == 0
    assert "1 missing parts captured: shard-000001" in capsys.readouterr().err
    assert run("verify", store, here) == 2
    assert run("inspect", "sample", store, "a0", f"data.shards={tmp_path}/nowhere") == 2
    assert f"looked in data.shards, {tmp_path}/nowhere" in capsys.readouterr().err
    assert run("inspect", store, "a0", here, "--out", tmp_path / "a.png") == 0
