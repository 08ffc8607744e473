"""The Trainer: one division a step, every term in the log, heads in the optimizer and in checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_experiment import STUDENT_LOSSES, rewrite_store, snapshot, weights
from watched import before_forward

from cache import Store
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.parts import needed_targets
from pipeline.distill.student import build_trainer, train_student
from pipeline.distill.training.resuming import HEADS_FILE, RUN_FILE
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.distill.training.trainer import DistillTrainer, NonFiniteLossError
from pipeline.distill.training.training_folder import Start, start_of
from pipeline.errors import ConfigError, JoinError
from pipeline.models.mobilevlm import MobileVLMForCausalLM

SGD = ["train.optim=sgd", "train.learning_rate=0.01"]
LABELS_ALONE = [f"losses.{name}=null" for name in STUDENT_LOSSES if name != "supervised"]


class RecordedDataset(JoinedDataset):
    """A join that remembers which samples it was asked for."""

    def __getitems__(self, indices: Sequence[int]):
        samples = super().__getitems__(indices)
        self.__dict__.setdefault("asked", []).extend(sample.key for sample in samples)
        return samples


@pytest.fixture
def trainer_of(experiment, tmp_path):
    """Builds a Trainer, not yet run, from overrides of the config."""

    def build(*overrides: str, folder: str = "run") -> DistillTrainer:
        config = experiment.config(tmp_path, *overrides)
        preparation = load_preparation(config.student.model, config.data)
        store = Store(config.one_cache.path)
        dataset = RecordedDataset(store, config.data.shards, preparation, targets=needed_targets(config))
        return build_trainer(
            config, tmp_path / folder, dataset, identity=RunIdentity("of a test", {}, samples_per_step=4)
        )

    return build


def state_after_training(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.clone() for name, value in trainer.distiller.state_dict().items()}


def assert_equal_states(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **tolerance) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if tolerance:
            torch.testing.assert_close(
                value, theirs[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(value, theirs[name]), name


def logged(trainer: DistillTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# The step


@pytest.mark.parametrize("optimizer", [SGD, ["train.optim=adamw_torch", "train.adam_epsilon=1e-2"]])
def test_a_step_does_not_depend_on_how_it_is_cut_into_batches(optimizer, trainer_of):
    states, losses = [], []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        cut = [
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={accumulation}",
        ]
        trainer = trainer_of(*optimizer, *cut, "train.max_steps=2", folder=f"{size}x{accumulation}")
        states.append(state_after_training(trainer))
        losses.append(logged(trainer))
    for state, log in zip(states[1:], losses[1:], strict=True):
        assert_equal_states(state, states[0], atol=1e-6, rtol=1e-5)
        for mine, theirs in zip(log, losses[0], strict=True):
            for name in (name for name in theirs if name.startswith(("loss", "kd/"))):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_an_epoch_that_ends_within_a_step_still_divides_by_what_was_there(trainer_of):
    # 13 samples: the last step of an epoch has 1 of 4.
    cut = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    epoch = ["train.max_steps=-1", "train.num_train_epochs=1", *SGD]
    accumulated = state_after_training(trainer_of(*epoch, *cut, folder="cut"))
    whole = state_after_training(trainer_of(*epoch, folder="whole"))
    assert_equal_states(accumulated, whole, atol=1e-6, rtol=1e-5)


def test_every_term_is_logged_raw_and_weighted_and_adds_up_to_the_loss(trainer_of):
    factors = {"supervised": 1.0, "attention": 3.0, "vision_all": 0.5, "vision_focus": 0.25, "logits": 2.0}
    trainer = trainer_of(*(f"losses.{name}.weight={factor}" for name, factor in factors.items()))
    trainer.train()
    for entry in logged(trainer):
        for name, factor in factors.items():
            assert entry[f"loss/{name}_weighted"] == pytest.approx(factor * entry[f"loss/{name}"])
        total = sum(entry[f"loss/{name}_weighted"] for name in factors)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_weights_of_zero_leave_the_plain_loss_of_transformers(trainer_of):
    zeros = [f"losses.{name}.weight=0" for name in STUDENT_LOSSES if name != "supervised"]
    trainer = trainer_of(*zeros, "train.max_steps=1")
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        pixels = torch.cat([image["pixel_values"] for image in batch["images"]])
        outputs = trainer.distiller.student(
            batch["input_ids"], batch["attention_mask"], batch["labels"], pixels
        )
        mine = trainer.compute_loss(trainer.distiller, batch)
    assert mine.item() == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(experiment, trainer_of, tmp_path):
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    tensors = weights(student)
    tensors["lm_head.weight"][:] = float("inf")
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    trainer = trainer_of(f"student.model={student}")
    before = trainer.distiller.student.model.embed_tokens.weight.clone()
    with pytest.raises(NonFiniteLossError, match=r"losses.supervised became nan at step 0; .*learning_rate"):
        trainer.train()
    assert torch.equal(trainer.distiller.student.model.embed_tokens.weight, before)


def test_a_store_that_lacks_rows_of_a_sample_stops_the_run(experiment, trainer_of, tmp_path):
    def cut(key, arrays):
        return {n: [b[1:] for b in a] if n == "attention/layer_0" else a for n, a in arrays.items()}

    store = rewrite_store(experiment.store, tmp_path / "store", cut)
    with pytest.raises(JoinError, match=r"sample .* target 'attention' and received"):
        trainer_of(f"cache.path={store}").train()


# What is trained


def test_heads_are_in_the_optimizer_at_their_own_rate_and_change(trainer_of):
    rates = ["student.head_learning_rate=0.01", "student.projector_learning_rate=0.002"]
    trainer = trainer_of(*rates, "train.weight_decay=0.1")
    before = {name: value.clone() for name, value in trainer.distiller.state_dict().items()}
    after = state_after_training(trainer)
    rate_of = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.distiller.named_parameters():
        if "vision_tower" in name:
            assert id(parameter) not in rate_of and torch.equal(before[name], after[name]), name
            continue
        expected = 0.01 if name.startswith("heads.") else 0.002 if "mm_projector" in name else 1e-3
        assert rate_of[id(parameter)] == expected, name
        assert not torch.equal(before[name], after[name]), name
    undecayed = [g for g in trainer.optimizer.param_groups if g["weight_decay"] == 0]
    assert {p.ndim for g in undecayed for p in g["params"]} == {1}


def test_the_same_seed_gives_the_same_weights_to_the_bit(trainer_of):
    first, second = (state_after_training(trainer_of(folder=name)) for name in ("a", "b"))
    assert_equal_states(first, second)
    other = state_after_training(trainer_of("train.seed=1", folder="c"))
    assert any(not torch.equal(value, first[name]) for name, value in other.items())


def test_runs_that_differ_in_losses_start_alike_and_see_the_same_data_in_the_same_order(trainer_of):
    distilled, alone = trainer_of(folder="a"), trainer_of(*LABELS_ALONE, folder="b")
    start = alone.distiller.student.state_dict()
    assert_equal_states({n: v.clone() for n, v in distilled.distiller.student.state_dict().items()}, start)
    distilled.train(), alone.train()
    assert distilled.train_dataset.asked == alone.train_dataset.asked
    assert len(set(alone.train_dataset.asked[:8])) == 8  # of two steps; accelerate reads a batch ahead
    mine, theirs = (logged(trainer)[0]["loss/supervised"] for trainer in (distilled, alone))
    assert mine == theirs == pytest.approx(logged(alone)[0]["loss"])


def test_patch_features_in_memory_train_the_same_student(trainer_of):
    steps = "train.max_steps=5"
    with_memory = trainer_of("student.patch_feature_cache_bytes=1000000", steps, *SGD, folder="a")
    mine = state_after_training(with_memory)
    assert with_memory.distiller.patch_feature_cache.currsize > 0
    assert_equal_states(mine, state_after_training(trainer_of(steps, *SGD, folder="b")), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_trains_the_same_student(trainer_of):
    mine = state_after_training(trainer_of("student.gradient_checkpointing=true", *SGD, folder="a"))
    assert_equal_states(mine, state_after_training(trainer_of(*SGD, folder="b")), atol=1e-6, rtol=1e-5)


# Checkpoints


@pytest.fixture
def interrupted(experiment, tmp_path):
    """A config that saves after 2 of 4 steps, the finished run, and another stopped at the checkpoint."""
    saving = ["train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2"]
    config = experiment.config(tmp_path, *saving, "train.resume_from_checkpoint=true")
    train_student(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    return config, tmp_path / "whole", tmp_path / "stopped"


def test_a_resumed_run_ends_where_the_whole_one_does_heads_included(interrupted):
    config, whole, stopped = interrupted
    first = load_file(whole / "checkpoint-2" / HEADS_FILE)
    train_student(config, stopped)
    for checkpoint, folder in ((True, "checkpoint-4"), (False, "model")):
        assert_equal_states(weights(stopped / folder), weights(whole / folder))
        if checkpoint:
            last = load_file(stopped / folder / HEADS_FILE)
            assert_equal_states(last, load_file(whole / folder / HEADS_FILE))
            assert all(not torch.equal(first[name], last[name]) for name in first)
    steps = [e["step"] for e in json.loads((stopped / "trainer_state.json").read_text())["log_history"]]
    assert steps[:4] == [1, 2, 3, 4]


def test_a_resumed_run_reads_no_sample_of_before(trainer_of, tmp_path):
    steps = ["train.max_steps=8", "train.save_strategy=steps", "train.save_steps=6"]
    whole, resumed = trainer_of(*steps), trainer_of(*steps)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert len(whole.train_dataset.asked) == 2 * 13
    assert resumed.train_dataset.asked == whole.train_dataset.asked[13 + 2 * 4 :]


def test_a_checkpoint_is_a_model_with_heads_beside_it_and_the_result_has_none(interrupted, experiment):
    _, whole, _ = interrupted
    heads = load_file(whole / "checkpoint-2" / HEADS_FILE)
    assert sorted(heads) == ["head_mixer.scores", "vision_map.bias", "vision_map.weight"]
    loaded = MobileVLMForCausalLM.from_pretrained(whole / "checkpoint-2")
    assert loaded.config.hidden_size == 24
    assert (whole / "checkpoint-2" / "tokenizer.model").is_file()
    for folder in ("checkpoint-2", "model"):
        assert weights(whole / folder).keys() == weights(experiment.student).keys()
    assert not (whole / "model" / HEADS_FILE).exists()
    assert not list(whole.glob("**/training_args.bin"))


def test_only_a_checkpoint_of_the_run_itself_can_be_resumed(interrupted, experiment):
    config, whole, stopped = interrupted
    elsewhere = {**config.train, "resume_from_checkpoint": str(whole / "checkpoint-2")}
    message = r"whole/checkpoint-2 is no checkpoint of the run in .*stopped; give `true`"
    with pytest.raises(ConfigError, match=message):
        train_student(config.model_copy(update={"train": elsewhere}), stopped)
    own = {**config.train, "resume_from_checkpoint": str(stopped / "checkpoint-2")}
    train_student(config.model_copy(update={"train": own}), stopped)
    assert_equal_states(weights(stopped / "model"), weights(whole / "model"))


@pytest.mark.parametrize("name", ["trainer_state.json", HEADS_FILE])
def test_a_checkpoint_cut_by_a_kill_is_passed_over_for_the_one_before(name, interrupted):
    config, whole, stopped = interrupted
    shutil.copytree(whole / "checkpoint-4", stopped / "checkpoint-4")
    file = stopped / "checkpoint-4" / name
    if name == HEADS_FILE:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20])
    run = json.loads((stopped / "checkpoint-2" / RUN_FILE).read_text())
    identity = RunIdentity(run["identity"], run["made_of"], run["samples_per_step"])
    start = start_of(config, stopped, identity, overwrite=False)
    assert start == Start(checkpoint=stopped / "checkpoint-2")


CHANGES = {
    "train.learning_rate=0.5": r"train\.learning_rate: 0\.001 -> 0\.5;",
    "losses.logits=null": r'losses\.logits: \{"weight": 0\.1, .*\} -> null;',
    "losses.logits.temperature=2": r"losses\.logits\.temperature: 1\.0 -> 2\.0;",
    "data.fraction=0.5": r"data\.fraction: 1\.0 -> 0\.5, samples\.number: 13 -> \d+;",
    "train.seed=7": r"train\.seed: not set -> 7;",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_other_settings_is_not_continued(change, interrupted, experiment, tmp_path):
    _, _, stopped = interrupted
    before = snapshot(stopped)
    saving = ["train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2"]
    for asked in ("true", str(stopped / "checkpoint-2")):
        config = experiment.config(tmp_path, *saving, f"train.resume_from_checkpoint={asked}", change)
        with pytest.raises(
            ConfigError, match=rf"checkpoint-2 was made with other settings: {CHANGES[change]} restore them"
        ):
            train_student(config, stopped)
    assert {name: kept for name, kept in snapshot(stopped).items() if "checkpoint-2" in name} == before


@pytest.mark.parametrize("name", ["model.safetensors", HEADS_FILE])
def test_a_checkpoint_whose_weights_are_broken_is_named(name, interrupted):
    config, _, stopped = interrupted
    file = stopped / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ConfigError, match=r"checkpoint-2\S*: not readable as weights \(SafetensorError: "):
        train_student(config, stopped)


def test_gradient_shares_are_each_terms_part_of_the_gradient(experiment, trainer_of, tmp_path):
    """Against one backward pass of each term alone, on the batch that the step saw."""
    shares = ["log_gradient_shares=true", "losses.logits.weight=0.5", "train.max_steps=1"]
    trainer = trainer_of(*shares)
    fresh = {name: value.clone() for name, value in trainer.distiller.state_dict().items()}
    batch = []
    with before_forward(Distiller, lambda _, inputs: batch.append(inputs)):
        trainer.train()
    logged = trainer.state.log_history[0]
    trainer.distiller.load_state_dict(fresh)
    norms = {}
    for name, settings in trainer.losses.items():
        trainer.distiller.zero_grad()
        total, count = trainer.distiller(batch[0])[name]
        (settings.weight * total / count).backward()
        gradients = [p.grad for p in trainer.distiller.student.parameters() if p.grad is not None]
        norms[name] = torch.cat([g.flatten() for g in gradients]).norm().item()
    expected = {f"gradient_share/{name}": norm / sum(norms.values()) for name, norm in norms.items()}
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert min(expected.values()) > 0


def test_logging_gradient_shares_changes_no_step_and_is_off_unless_asked_for(trainer_of):
    plain, logged = trainer_of(folder="plain"), trainer_of("log_gradient_shares=true", folder="logged")
    assert_equal_states(state_after_training(plain), state_after_training(logged))
    assert not [name for entry in plain.state.log_history for name in entry if "gradient_share" in name]
    steps = [entry for entry in logged.state.log_history if "gradient_share/logits" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
