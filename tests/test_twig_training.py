"""`alignkd twig train`: from stored hidden states to a twig, with no base in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_experiment import Experiment, log_of, losses_of_steps, snapshot
from test_resume import TEN_STEPS, curve
from torch import Tensor
from twig_experiment import TARGETS, TWIG, twig_experiment
from watched import train_until

import cli
from cache import FingerprintMismatch
from pipeline.config.config import Config
from pipeline.distill.join.dataset import JoinCollator
from pipeline.distill.training.resuming import ADAPTERS_FILE
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX, find_slots, last_prompt_positions
from pipeline.report.gather import gather
from pipeline.targets.vocabulary import score_answers
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.twig.folder import load_twig, read_twig_config
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.training.beginning import Beginning
from pipeline.twig.training.train import build_twig_distiller, train_twig, twig_job

LORA = "twig.lora={rank: 2, alpha: 3, target_modules: [q_proj, down_proj]}"


@pytest.fixture(scope="module")
def small(experiment, tmp_path_factory) -> Experiment:
    return twig_experiment(experiment, tmp_path_factory.mktemp("twig"))


@pytest.fixture(scope="module")
def made_of(experiment, tmp_path_factory) -> Callable[..., Experiment]:
    """Returns an experiment of other settings."""
    return lambda **named: twig_experiment(experiment, tmp_path_factory.mktemp("other"), **named)


def tensors(run: Path) -> dict[str, Tensor]:
    return load_file(run / "twig" / "twig.safetensors")


def assert_same_run(mine: Path, theirs: Path) -> None:
    assert curve(mine) == curve(theirs)
    assert_same(tensors(mine), tensors(theirs))


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: Any) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if tolerance:
            torch.testing.assert_close(mine[name], value, **tolerance)
        else:
            assert torch.equal(mine[name], value), name


def first_weights(config: Any) -> dict[str, Tensor]:
    return Beginning.of(config, twig_job(config).dataset.stores.opened[0]).twig().state_dict()


# What is trained, and from what


def test_a_twig_begins_as_a_copy_of_the_bases_layers_and_learns(small, tmp_path):
    config = small.config(tmp_path, "train.max_steps=12")
    base = load_network(str(small.teacher), dtype=torch.float32)
    before = first_weights(config)
    for number, layer in enumerate(base.model.layers[1:3]):
        assert_same({n: before[f"layers.{number}.{n}"] for n in layer.state_dict()}, layer.state_dict())
    assert torch.equal(before["norm.weight"], base.model.norm.weight)
    assert torch.equal(before["head.weight"], base.lm_head.weight)
    folder = train_twig(config, tmp_path / "run")
    assert folder == tmp_path / "run" / "twig"
    after = tensors(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    losses = [step["loss/supervised"] for step in losses_of_steps(tmp_path / "run")]
    assert losses[-1] < losses[0]
    geometry, of_base = read_twig_config(folder)
    assert (geometry.attach_layer, geometry.num_layers, geometry.wipe_layer, geometry.num_base_layers) == (
        1,
        2,
        2,
        3,
    )
    assert of_base.name == str(small.teacher)
    assert_same(load_twig(folder, base).state_dict(), after)


def reduced(small: Experiment, keep: Callable[[str], bool] | None) -> None:
    """Leave only some tensors of the base on the disk; None: no file of weights."""
    file = small.teacher / "model.safetensors"
    kept = {} if keep is None else {name: value for name, value in load_file(file).items() if keep(name)}
    file.unlink()
    if kept:
        save_file(kept, file)


def test_no_tensor_of_the_base_is_needed_but_those_that_the_twig_begins_with(small, made_of, tmp_path):
    train_twig(small.config(tmp_path), tmp_path / "whole")
    alone = made_of()
    parts = ("model.layers.1.", "model.layers.2.", "model.norm.", "lm_head.")
    reduced(alone, lambda name: name.startswith(parts))
    assert len(load_file(alone.teacher / "model.safetensors")) == 2 * 9 + 2
    train_twig(alone.config(tmp_path), tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_random_first_weights_need_no_file_of_the_base(made_of, tmp_path):
    alone = made_of(twig=TWIG | {"first_weights": "random"})
    reduced(alone, None)
    base = read_twig_config(train_twig(alone.config(tmp_path), tmp_path / "run"))[1]
    assert {"vision", "embeddings", "layer 0", "head"} <= base.digests.keys()
    first = first_weights(alone.config(tmp_path))
    assert torch.equal(first["norm.weight"], torch.ones(32))
    assert 0.015 < float(first["layers.1.mlp.up_proj.weight"].std()) < 0.025
    losses = [step["loss/supervised"] for step in losses_of_steps(tmp_path / "run")]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(512.0)).item(), rel=0.05)


def test_with_hidden_states_in_the_store_nothing_of_the_shards_is_read(small, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a shard was read")

    for name in ("read_pixels", "compare_text", "own_text"):
        monkeypatch.setattr(f"pipeline.distill.join.dataset.{name}", refuse)
    train_twig(small.config(tmp_path), tmp_path / "run")


def test_the_loss_and_its_gradients_are_those_of_the_real_base_bit_for_bit(made_of, tmp_path):
    """One sample at a time: several images, none, an image behind text."""
    small = made_of(more=["teacher.batch_size=1"])
    config = small.config(tmp_path)
    job = twig_job(config)
    dataset = job.dataset
    beginning = Beginning.of(config, dataset.stores.opened[0])
    distiller = build_twig_distiller(config, beginning, dataset)
    twig = beginning.twig()
    vlm = VisionLanguageModel(load_network(str(small.teacher), dtype=torch.float32).eval())
    collate = JoinCollator(dataset.targets, dataset.preparation.image_token_id)
    # Stage 1 encodes the image of a0 to a2 together with another one of "apart", and sums of two round otherwise.
    alone = [n for n in range(len(dataset)) if dataset.rows[n][1].key not in ("a0", "a1", "a2")]
    assert len(alone) == 10
    stored = {number: collate([dataset[number]]) for number in alone}
    dataset.reads_shards = True
    for number, batch in stored.items():
        assert not batch["images"]
        online(vlm, twig, collate([dataset[number]])).backward()
        total, _ = distiller(batch)["supervised"]
        total.backward()
    for name, parameter in twig.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        mine = distiller.twig.get_parameter(name).grad
        assert mine is not None and torch.equal(mine, parameter.grad), name


def online(vlm: VisionLanguageModel, twig: Any, batch: dict[str, Any]) -> Tensor:
    """Return the sum of the cross entropy over a batch, from pixels through the whole base."""
    sizes = [size for of_sample in batch["sizes"] for size in of_sample]
    predicts = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1))
    with torch.no_grad():
        features = vlm.encode(batch["images"], sizes) if sizes else None
        inputs = vlm.inputs(batch, features)
        hidden = vlm.network(**inputs, output_hidden_states=True, use_cache=False).hidden_states[1]
        layer_inputs = LayerInputs.record(vlm.network, inputs)
    labels = batch["labels"][:, 1:][predicts[:, :-1]]
    slots = find_slots(batch["is_vision"], batch["attention_mask"])
    rows = last_prompt_positions(batch["labels"], batch["attention_mask"])
    logits, _ = twig(hidden, layer_inputs, predicts, rows, slots.vision)
    return -score_answers(logits, labels).label.sum()


def test_hidden_states_that_are_recomputed_train_the_same_twig(small, made_of, tmp_path):
    before = snapshot(small.teacher)
    cut = ["train.max_steps=4"]
    train_twig(small.config(tmp_path, *cut), tmp_path / "stored")
    again = [*cut, "targets.hidden_states.source=recompute", "student.patch_feature_cache_bytes=1000000"]
    train_twig(small.config(tmp_path, *again), tmp_path / "recomputed")
    assert_same(tensors(tmp_path / "recomputed"), tensors(tmp_path / "stored"), rtol=1e-4, atol=1e-5)
    assert snapshot(small.teacher) == before


@pytest.mark.parametrize(("attach", "layers", "keep"), [(0, 1, 0.6), (0, 3, 0.6), (2, 1, 0.9)])
def test_a_twig_grows_at_any_layer(attach, layers, keep, made_of, tmp_path):
    """On the embeddings, up to the base's depth, and as long as the base."""
    targets = {"hidden_states": TARGETS["hidden_states"] | {"layer": attach}}
    small = made_of(twig={"attach_layer": attach, "num_layers": layers, "keep": keep}, targets=targets)
    folder = train_twig(small.config(tmp_path), tmp_path / "run")
    assert (
        len({name.split(".")[1] for name in load_file(folder / "twig.safetensors") if "layers" in name})
        == layers
    )


def test_the_losses_of_logits_train_a_twig_too(made_of, tmp_path):
    small = made_of(targets=TARGETS | {"logits": {"top_k": 8}}, more=["losses.logits={}"])
    train_twig(small.config(tmp_path), tmp_path / "run")
    assert {"loss/supervised", "loss/logits"} <= losses_of_steps(tmp_path / "run")[0].keys()


# As students are trained


def test_a_twig_stopped_after_a_step_goes_on_as_if_it_had_not(small, tmp_path):
    config = small.config(tmp_path, *TEN_STEPS, "train.dataloader_num_workers=2")
    train_twig(config, tmp_path / "whole")
    for step in (4, 7):
        train_until(step, config, tmp_path / "run", match=rf"after step {step} of 10", train=train_twig)
        assert (tmp_path / "run" / f"checkpoint-{step}" / "twig.safetensors").is_file()
    train_twig(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    finished = snapshot(tmp_path / "run" / "twig")
    train_twig(config, tmp_path / "run")
    assert snapshot(tmp_path / "run" / "twig") == finished
    with pytest.raises(
        PipelineError, match=r"made with other settings: twig.num_layers: 2 -> 1|holds a finished"
    ):
        train_twig(small.config(tmp_path, *TEN_STEPS, "twig.num_layers=1"), tmp_path / "run")
    train_twig(small.config(tmp_path, "twig.num_layers=1"), tmp_path / "run", overwrite=True)
    assert len(tensors(tmp_path / "run")) == 9 + 2


def test_a_step_may_be_cut_into_batches(small, tmp_path):
    sgd = ["train.max_steps=4", "train.optim=sgd", "train.learning_rate=0.01"]
    train_twig(small.config(tmp_path, *sgd), tmp_path / "whole")
    cut = ["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    train_twig(small.config(tmp_path, *sgd, *cut, "twig.gradient_checkpointing=true"), tmp_path / "cut")
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"), rtol=1e-4, atol=1e-5)


def test_adapters_are_merged_and_the_rest_of_the_layers_stays(small, tmp_path):
    config = small.config(tmp_path, *TEN_STEPS, LORA)
    before = first_weights(config)
    train_twig(config, tmp_path / "whole")
    train_until(5, config, tmp_path / "run", train=train_twig)
    train_twig(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    after = tensors(tmp_path / "run")
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    adapted = {name for name in before if "q_proj" in name or "down_proj" in name}
    assert after.keys() == before.keys() and moved == adapted | {"norm.weight", "head.weight"}
    saved = tmp_path / "run" / "checkpoint-5"
    adapters, merged = load_file(saved / ADAPTERS_FILE), load_file(saved / "twig.safetensors")
    layer = "layers.1.mlp.down_proj"
    change = adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{layer}.weight"], before[f"{layer}.weight"] + 1.5 * change)


def test_held_out_losses_are_logged_and_the_best_twig_is_kept(made_of, experiment, tmp_path):
    """The held-out shard is one of the training's."""
    small = made_of(more=[f"data.held_out_shards={experiment.shard(1)}"])
    held = [
        "train.eval_strategy=steps",
        "train.eval_steps=2",
        "train.max_steps=6",
        "train.learning_rate=0.05",
    ]
    best = ["train.load_best_model_at_end=true", "train.save_strategy=steps", "train.save_steps=2"]
    folder = train_twig(small.config(tmp_path, *held, *best), tmp_path / "run")
    losses = {e["step"]: e["eval_supervised"] for e in log_of(tmp_path / "run") if "eval_loss" in e}
    assert list(losses) == [2, 4, 6]
    step = min(losses, key=lambda step: losses[step])
    assert_same(
        load_file(folder / "twig.safetensors"),
        load_file(tmp_path / f"run/checkpoint-{step}/twig.safetensors"),
    )


@pytest.mark.parametrize("how", [["twig.dtype=bfloat16"], ["train.bf16=true"]])
def test_a_twig_is_trained_in_half_precision(how, small, tmp_path):
    train_twig(small.config(tmp_path, *how), tmp_path / "run")
    expected = torch.bfloat16 if "twig" in how[0] else torch.float32
    assert {tensor.dtype for tensor in tensors(tmp_path / "run").values()} == {expected}


# What is refused


def test_a_twig_is_refused_on_another_base(small, tiny_model, tmp_path):
    folder = train_twig(small.config(tmp_path), tmp_path / "run")
    other = tiny_model(seed=5, vocab_size=512, num_key_value_heads=2)
    with pytest.raises(
        ConfigError, match=r"belongs to the base .*use its own base, or train a twig for this one"
    ):
        load_twig(folder, other)


def test_first_weights_of_another_base_are_refused(made_of, tiny_model, tmp_path):
    small = made_of()
    tiny_model(seed=5, vocab_size=512, num_key_value_heads=2).save_pretrained(small.teacher)
    with pytest.raises(FingerprintMismatch, match=r"twig.zarr holds something else .* teacher: "):
        train_twig(small.config(tmp_path), tmp_path / "run")
    tiny_model(seed=5, vocab_size=512, num_hidden_layers=4).save_pretrained(small.teacher)
    with pytest.raises(ConfigError, match=r"num_layers of the base .* is 4, .* made with a teacher of 3"):
        train_twig(small.config(tmp_path, "twig.first_weights=random"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.dtype=bfloat16"], r"student: set beside `twig`, .* leave the section out"),
        (["student={model: elsewhere}"], r"student: set beside `twig`"),
        (["baseline=true"], r"baseline: true trains a student .* set it to false"),
        (["targets.hidden_states=null"], r"twig needs the target 'hidden_states'.*add `targets.hidden_states: "),
        (["twig.attach_layer=2"], r"twig.attach_layer is 2, but targets.hidden_states.layer is 1; .* one number"),
        (["losses.attention={}", "targets.attention={}"], r"losses.attention compares attention .* set losses.att"),
        (["losses.vision_all={}", "targets.vision={}"], r"losses.vision_all compares vision with what is inside"),
        (["losses.supervised=null"], r"losses: none is left to train the twig with"),
        (["twig.layers=2"], r"twig.layers: unknown key; did you mean 'num_layers'\?"),
    ],
)  # fmt: skip
def test_sections_that_do_not_go_together_are_refused_in_one_sentence(overrides, message, small, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        small.config(tmp_path, *overrides)
    assert len(str(error.value).splitlines()) == 2  # the file, and the sentence


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["twig.num_layers=3"], r"attach_layer \(K\) 1 and num_layers \(T\) 3 asked for, the base has 3 layers"),
        (["twig.wipe_layer=1"], r"wipe_layer \(Kf\) 1 asked for"),
        (["twig.keep=0.1"], r"keep: 0.1 of 4 vision tokens asked for"),
        (["twig.first_weights=random", LORA], r"twig.lora: adapters train nothing else .* set twig.first_weights to"),
        (["twig.lora={target_modules: [c_attn]}"], r"twig.lora.target_modules: no decoder layer has .*'c_attn'"),
    ],
)  # fmt: skip
def test_numbers_that_the_base_does_not_allow_are_refused(overrides, message, small, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_twig(small.config(tmp_path, *overrides), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_store_of_another_layer_is_refused(small, tmp_path):
    other = ["twig={attach_layer: 2, num_layers: 1}", "targets.hidden_states.layer=2"]
    with pytest.raises(FingerprintMismatch, match=r"capture"):
        train_twig(small.config(tmp_path, *other), tmp_path / "run")
    allowed = [*other, "cache.allow_mismatch=[capture]"]
    with pytest.raises(
        ConfigError, match=r"is 2, but .* holds .* after layer 1, which allow_mismatch cannot"
    ):
        train_twig(small.config(tmp_path, *allowed), tmp_path / "run")


# The command and the report


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_the_command_says_what_was_trained_and_the_report_shows_its_curves(small, tmp_path, capsys):
    command = ["twig", "train", "--config", small.file, f"output_dir={tmp_path}/out"]
    assert run_command(*command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{tmp_path}/out/twig: 0.") and "% of the base's" in shown[0]
    assert shown[1].startswith(
        "2 layers on the output of base layer 1 of 3, as deep as base layer 3; its base is"
    )
    findings = gather(tmp_path / "out")
    assert findings.kind == "run" and findings.runs[0].terms == ("supervised",)
    assert len(findings.runs[0].history or ()) == 2
    assert run_command("report", tmp_path / "out") == 0


def test_a_command_for_the_other_kind_of_config_is_refused(small, experiment, tmp_path, capsys):
    place = f"output_dir={tmp_path}/out"
    assert run_command("distill", "--config", small.file, place) == 2
    assert (
        "the config has a `twig` section, which takes the place of a student; train it with"
        in capsys.readouterr().err
    )
    assert run_command("twig", "train", "--config", experiment.file, place) == 2
    assert "the config has no `twig` section; add one, such as" in capsys.readouterr().err


def test_a_config_of_a_twig_is_written_and_read_back(small, tmp_path):
    from pipeline.config.config import load_config, to_yaml

    config = small.config(tmp_path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    moved = shutil.copytree(small.teacher, tmp_path / "moved")
    train_twig(config, tmp_path / "run")
    elsewhere = [f"teacher.model={moved}", f"student.model={moved}"]
    train_twig(
        small.config(tmp_path, *elsewhere), tmp_path / "run"
    )  # finished: the same base in another place


# Other families


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_twig_of_another_family_is_trained_from_the_store_as_with_its_base(
    family, family_folder, family_shards, tmp_path
):
    """Positions of Qwen's images come from the store, and so does what sees each other of Gemma's."""
    sections = {
        "output_dir": str(tmp_path / "out"),
        "teacher": {"model": str(family_folder(family)), "batch_size": 3},
        "twig": {"attach_layer": 1, "num_layers": 1},
        "data": {"shards": str(family_shards), "template": "chat"},
        "cache": {"path": str(tmp_path / "store")},
        "targets": TARGETS,
        "train": {"max_steps": 2, "per_device_train_batch_size": 3, "report_to": "none", "use_cpu": True},
    }
    config = Config.model_validate(sections)
    cache_teacher(config)
    job = twig_job(config)
    beginning = Beginning.of(config, job.dataset.stores.opened[0])
    collate = JoinCollator(job.dataset.targets, job.dataset.preparation.image_token_id)
    numbers = range(len(job.dataset))
    total, _ = build_twig_distiller(config, beginning, job.dataset)(
        collate([job.dataset[n] for n in numbers])
    )["supervised"]
    job.dataset.reads_shards = True
    job.dataset.stored.clear()
    vlm = VisionLanguageModel(load_network(str(family_folder(family)), dtype=torch.float32).eval())
    batch = collate([job.dataset[n] for n in numbers])
    assert len(batch["images"]) > 2
    torch.testing.assert_close(total, online(vlm, beginning.twig(), batch), rtol=1e-5, atol=1e-4)
    assert (train_twig(config, tmp_path / "out") / "twig.safetensors").is_file()
