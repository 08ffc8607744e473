"""Held-out losses: what the Distiller gives on samples that are never trained on, and no trace in the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launched import TORCHRUN, distill
from safetensors.torch import load_file
from small_experiment import log_of, rewrite_store, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched import steps_of_training, tokens_of

from cache import Store
from pipeline.distill.parts import build_distiller, load_student, open_dataset, open_held_out
from pipeline.distill.student import train_student
from pipeline.distill.training.resuming import HEADS_FILE
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.errors import ConfigError, JoinError
from pipeline.teacher_cache.teacher import cache_teacher, plan_capture
from pipeline.upkeep.plan import plan_store

EVERY_STEP = ["train.eval_strategy=steps", "train.eval_steps=1"]
LOSSES = ("supervised", "attention", "vision_all", "vision_focus", "logits")


@pytest.fixture
def config_of(experiment, tmp_path):
    """Builds a config whose last shard, of three samples, is held out."""

    def build(*overrides: str):
        return experiment.config(tmp_path, f"data.held_out_shards={experiment.shard(2)}", *overrides)

    return build


def held_out_log(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in log_of(folder) if "eval_loss" in entry]


def losses_of(entry: dict[str, float]) -> dict[str, float]:
    return {name: entry[f"eval_{name}"] for name in ("loss", *LOSSES)}


def plain_losses(config, folder: Path) -> dict[str, float]:
    """The losses of the student of a checkpoint, in a loop over the held-out samples one by one."""
    dataset, collate = open_dataset(config)
    held_out = open_held_out(config, dataset)
    torch.manual_seed(0)
    distiller = build_distiller(config, load_student(config), dataset, held_out=held_out).eval()
    distiller.student.load_state_dict(weights(folder))
    distiller.heads.load_state_dict(load_file(folder / HEADS_FILE))
    totals, counts = (dict.fromkeys(LOSSES, 0.0) for _ in range(2))
    with torch.no_grad():
        for number in range(len(held_out)):
            for name, (total, count) in distiller(collate([held_out[number]])).items():
                totals[name] += total.item()
                counts[name] += count.item()
    means = {name: totals[name] / counts[name] for name in LOSSES}
    loss = sum(settings.weight * means[name] for name, settings in config.losses.active().items())
    return {"loss": loss, **means}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_held_out_losses_are_those_of_a_plain_loop_over_all_samples(batch_size, config_of, tmp_path):
    saving = ["train.save_strategy=steps", "train.save_steps=1", "losses.attention.weight=3"]
    config = config_of(*EVERY_STEP, *saving, f"train.per_device_eval_batch_size={batch_size}")
    train_student(config, tmp_path / "run")
    entries = held_out_log(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2]
    for entry in entries:
        expected = plain_losses(config, tmp_path / "run" / f"checkpoint-{entry['step']}")
        assert losses_of(entry) == pytest.approx(expected, rel=1e-5)
    assert entries[0]["eval_loss"] != entries[1]["eval_loss"]


def test_a_training_is_the_same_to_the_bit_with_and_without_them(config_of, tmp_path):
    lora = ["student.lora={dropout: 0.5}", "student.patch_feature_cache_bytes=3000", "train.max_steps=4"]
    train_student(config_of(*lora), tmp_path / "without")
    train_student(config_of(*lora, *EVERY_STEP, "train.eval_on_start=true"), tmp_path / "with")
    assert len(held_out_log(tmp_path / "with")) == 5
    mine, theirs = weights(tmp_path / "with" / "model"), weights(tmp_path / "without" / "model")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    logs = [[e["loss"] for e in log_of(tmp_path / name) if "loss" in e] for name in ("with", "without")]
    assert logs[0] == logs[1]


def test_workers_that_load_held_out_samples_change_nothing_either(config_of, tmp_path):
    train_student(config_of(), tmp_path / "without")
    train_student(config_of(*EVERY_STEP, "train.dataloader_num_workers=1"), tmp_path / "with")
    mine, theirs = weights(tmp_path / "with" / "model"), weights(tmp_path / "without" / "model")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_held_out_samples_are_never_trained_on(config_of, experiment, tmp_path):
    with steps_of_training() as steps:
        train_student(config_of("train.max_steps=-1", "train.num_train_epochs=2"), tmp_path / "run")
    store = Store(experiment.store)
    seen = {tokens for step in steps for tokens in step}
    held_out = {tokens_of(store, entry.key) for entry in store.entries("shard-000002")}
    assert len(held_out) == 3 and len(seen) == 10
    assert not seen & held_out


def test_a_resumed_run_logs_the_same_held_out_losses_and_ends_alike(config_of, tmp_path):
    saving = ["train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2"]
    config = config_of(*EVERY_STEP, *saving, "train.resume_from_checkpoint=true")
    train_student(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(stopped / "checkpoint-2")
    train_student(config, stopped)
    mine, theirs = weights(stopped / "model"), weights(tmp_path / "whole" / "model")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert list(map(losses_of, held_out_log(stopped))) == list(
        map(losses_of, held_out_log(tmp_path / "whole"))
    )


def test_held_out_losses_are_in_tensorboard(config_of, tmp_path):
    train_student(config_of(*EVERY_STEP, "train.report_to=tensorboard"), tmp_path / "run")
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent)).Reload()
    [entry, _] = held_out_log(tmp_path / "run")
    for name, value in losses_of(entry).items():
        assert events.Scalars(f"eval/{name}")[0].value == pytest.approx(value)


@pytest.mark.parametrize("metric", ["supervised", "eval_logits"])
def test_the_best_weights_by_a_held_out_loss_are_the_result(metric, config_of, tmp_path, capsys):
    # So fast that the student gets worse.
    best = ["train.load_best_model_at_end=true", f"train.metric_for_best_model={metric}", "train.max_steps=6"]
    saving = ["train.save_strategy=steps", "train.save_steps=1", "train.learning_rate=0.05"]
    train_student(config_of(*EVERY_STEP, *saving, *best), tmp_path / "run")
    entries = held_out_log(tmp_path / "run")
    step = min(entries, key=lambda entry: entry[f"eval_{metric.removeprefix('eval_')}"])["step"]
    assert step != 6
    mine, theirs = weights(tmp_path / "run" / "model"), weights(tmp_path / "run" / f"checkpoint-{step}")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (
        f"the weights are those of {tmp_path}/run/checkpoint-{step}, with the best "
        in capsys.readouterr().err
    )


def test_held_out_settings_are_of_the_run_only_where_they_decide_something(config_of, experiment):
    def identity(*overrides: str) -> RunIdentity:
        config = config_of(*overrides)
        dataset, _ = open_dataset(config)
        return RunIdentity.of(config, dataset, open_held_out(config, dataset))

    plain = identity()
    assert not identity(*EVERY_STEP).changes(plain.to_json())
    saving = ["train.save_strategy=steps", "train.save_steps=2", "train.eval_strategy=steps"]
    best = [*saving, "train.load_best_model_at_end=true"]
    one = identity(*best, "train.eval_steps=1")
    other = identity(*best, "train.eval_steps=2")
    assert [change.key for change in other.changes(one.to_json())] == ["train.eval_steps"]
    moved = identity(*best, "train.eval_steps=1", f"data.held_out_shards={experiment.shard(1)}")
    assert "held-out samples.contents" in [change.key for change in moved.changes(one.to_json())]


REFUSED = {
    "data.held_out_shards=null train.eval_strategy=epoch": r"train.eval_strategy needs held-out samples, but data",
    "train.metric_for_best_model=accuracy": r"the held-out losses are loss, supervised, .*found 'accuracy'",
    "baseline=true train.metric_for_best_model=logits": r"the held-out losses are loss, supervised, found 'logits'",
    "train.bf16_full_eval=true": r"held-out losses are computed as those of the training are",
    "train.greater_is_better=true": r"every metric is a loss, of which less is better",
    "train.evaluation_strategy=steps": r"transformers 5 takes `eval_strategy`",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(overrides, config_of):
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        config_of(*overrides.split())


def test_nothing_left_to_train_on_is_refused(config_of, experiment):
    with pytest.raises(ConfigError, match=r"names all 3 shards of data.shards: nothing is left to train on"):
        open_dataset(config_of(f"data.held_out_shards={experiment.shards}"))


def test_held_out_shards_that_the_store_does_not_hold_are_refused(config_of, experiment, tmp_path):
    absent = shutil.copy(experiment.held_out / "shard-000000.tar", tmp_path / "absent.tar")
    with pytest.raises(ConfigError, match=r"has no finished part for 1 of 1 shards, first 'absent'; run `al"):
        train_student(config_of(f"data.held_out_shards={absent}"), tmp_path / "run")


def test_held_out_samples_that_a_store_lacks_are_left_out_and_listed(config_of, experiment, tmp_path, capsys):
    cut = rewrite_store(experiment.store, tmp_path / "cut", without=["d1"])
    stores = f"caches=[{{path: {experiment.store}, targets: [attention]}}, {{path: {cut}}}]"
    config = config_of("cache=null", stores, *EVERY_STEP)
    with pytest.raises(JoinError, match=r"sample 'd1' is not in .*cut"):
        train_student(config, tmp_path / "run")
    train_student(config_of("cache=null", stores, *EVERY_STEP, "on_missing=skip"), tmp_path / "run")
    assert "on_missing: skip: held out: 1 of 3 samples are not in" in capsys.readouterr().err
    [missing] = json.loads((tmp_path / "run" / "provenance.json").read_text())["held_out_missing"]
    assert missing["first"] == "d1"


def test_stage_1_captures_held_out_shards_too(experiment, tmp_path):
    shards = [f"data.shards={experiment.shard(0)}", f"data.held_out_shards={experiment.shard(1)}"]
    config = experiment.config(tmp_path, *shards, f"cache.path={tmp_path}/store", *EVERY_STEP)
    assert plan_capture(config).manifest.planned_parts == ("shard-000000", "shard-000001")
    cache_teacher(config)
    train_student(config, tmp_path / "run")
    assert len(held_out_log(tmp_path / "run")) == 2


def test_two_processes_give_the_held_out_losses_of_one(config_of, experiment, tmp_path):
    steps = [*EVERY_STEP, "train.optim=sgd", "train.learning_rate=0.01"]
    # Three samples: the second batch leaves the second process with a filler.
    train_student(config_of(*steps), tmp_path / "one")
    half = ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=1"]
    shards = f"data.held_out_shards={experiment.shard(2)}"
    process = distill(experiment, tmp_path / "two", shards, *steps, *half, launcher=TORCHRUN)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    for mine, theirs in zip(
        held_out_log(tmp_path / "two" / "align_kd"), held_out_log(tmp_path / "one"), strict=True
    ):
        assert losses_of(mine) == pytest.approx(losses_of(theirs), rel=1e-5)


def test_a_plan_counts_held_out_shards(experiment, tmp_path):
    shards = [f"data.shards={experiment.shard(0)}", f"data.held_out_shards={experiment.shard(1)}"]
    plan = plan_store(experiment.config(tmp_path, *shards, f"cache.path={tmp_path}/store"), num_samples=8)
    assert (plan.num_shards, plan.num_samples, plan.probed_samples) == (2, 10, 8)
