"""LoRA: adapters, projector and heads move and nothing else; what is saved is the student with them merged."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from small_experiment import weights
from test_resume import TEN_STEPS, assert_same_run
from watched import train_until

from pipeline.config.model_settings import LoraConfig
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.join.stores import open_stores
from pipeline.distill.model.adapters import add_adapters, merged_tensors
from pipeline.distill.parts import needed_targets
from pipeline.distill.student import build_trainer, train_student
from pipeline.distill.training.resuming import ADAPTERS_FILE
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import MobileVLMForCausalLM

LORA = "student.lora={rank: 2, alpha: 3, target_modules: [q_proj, down_proj]}"


def test_only_adapters_projector_and_heads_move(experiment, tmp_path):
    config = experiment.config(tmp_path, LORA)
    preparation = load_preparation(config.student.model, config.data)
    stores = open_stores(config, preparation)
    dataset = JoinedDataset(stores, config.data.shards, preparation, targets=needed_targets(config))
    trainer = build_trainer(
        config, tmp_path / "run", dataset, identity=RunIdentity("of a test", {}, samples_per_step=4)
    )
    before = {name: value.clone() for name, value in trainer.distiller.state_dict().items()}
    trainer.train()
    moved = {n for n, value in trainer.distiller.state_dict().items() if not torch.equal(value, before[n])}
    adapters = {n for n in before if ".lora_" in n}
    assert moved == adapters | {n for n in before if "mm_projector" in n or n.startswith("heads.")}
    assert {name.split(".")[5] for name in adapters} == {"q_proj", "down_proj"}
    assert len(adapters) == 2 * 2 * 2 and not [name for name in adapters if "vision_tower" in name]


def test_the_merged_student_answers_as_the_adapted_one(tiny_model, make_batch):
    settings = LoraConfig(rank=3, alpha=4.5)
    adapted, plain = tiny_model(seed=1), tiny_model(seed=1)
    add_adapters(adapted, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero to begin with
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    batch = make_batch([3, -200, 5], [9]).inputs()
    first = plain(**batch).logits
    plain.load_state_dict(merged_tensors(adapted.state_dict(), adapted.config, settings))
    torch.testing.assert_close(plain(**batch).logits, adapted.eval()(**batch).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, adapted(**batch).logits, rtol=1e-2, atol=1e-2)


def test_a_merged_weight_in_half_precision_is_rounded_once(tiny_model):
    adapted, settings = tiny_model().bfloat16(), LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj"])
    add_adapters(adapted, settings)
    torch.nn.init.normal_(adapted.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    state, name = adapted.state_dict(), "model.layers.0.self_attn.q_proj"
    change = (
        2.0 * state[f"{name}.lora_B.default.weight"].float() @ state[f"{name}.lora_A.default.weight"].float()
    )
    wanted = (state[f"{name}.base_layer.weight"].float() + change).bfloat16()
    assert torch.equal(merged_tensors(state, adapted.config, settings)[f"{name}.weight"], wanted)


def test_a_run_with_adapters_is_a_plain_student_and_goes_on_bit_for_bit(experiment, tmp_path):
    # With dropout, whose random numbers go on as well.
    config = experiment.config(tmp_path, *TEN_STEPS, LORA.replace("alpha", "dropout: 0.2, alpha"))
    train_student(config, tmp_path / "whole")
    assert weights(tmp_path / "whole" / "model").keys() == weights(experiment.student).keys()
    for step in (3, 5):
        train_until(step, config, tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    saved = tmp_path / "run" / "checkpoint-5"
    merged = MobileVLMForCausalLM.from_pretrained(saved).state_dict()
    adapters, first = load_file(saved / ADAPTERS_FILE), weights(experiment.student)
    layer = "model.layers.1.mlp.down_proj"
    change = adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(merged[f"{layer}.weight"], first[f"{layer}.weight"] + 1.5 * change)
    assert torch.equal(merged["lm_head.weight"], first["lm_head.weight"])


def test_without_peft_a_sentence_says_what_to_install(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ConfigError, match=r"student.lora needs the package peft, .* `pip install 'alignkd\[lora\]'`"
    ):
        train_student(experiment.config(tmp_path, LORA), tmp_path / "run")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", r"no decoder layer has a linear map 'q_prj'; did you mean 'q_proj'\?"),
        ("norm", r"no decoder layer has a linear map 'norm'; known: down_proj, gate_proj, k_proj"),
    ],
)
def test_a_target_that_is_no_linear_map_of_a_layer_is_a_sentence(target, message, experiment, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_student(
            experiment.config(tmp_path, f"student.lora={{target_modules: [{target}]}}"), tmp_path / "run"
        )
