"""Every shipped config loads, says how it is run, and holds the numbers of the recipe that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from command_lines import ROOT, check_line

from pipeline.config.config import Config, load_config
from pipeline.losses.losses import LOSSES
from pipeline.targets.targets import TARGETS

LAUNCHERS = ROOT / "configs" / "accelerate"  # read by `accelerate launch`: see test_scaling.py
CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent != LAUNCHERS)
NUM_GPUS = 8


def _recipe(name: str) -> Config:
    return load_config(ROOT / "configs" / "mobilevlm_v2" / f"{name}.yaml")


def _header(file: Path) -> list[str]:
    """The comment above the first key; a command that goes on behind a backslash is one line."""
    lines = re.sub(r" \\\n# +", " ", file.read_text()).splitlines()
    return [line.removeprefix("#") for line in lines[: next(i for i, s in enumerate(lines) if s[:1] != "#")]]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_loads(file: Path):
    load_config(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_is_headed_by_what_it_is_and_a_command_that_works(file: Path):
    header = _header(file)
    commands = [
        line.strip() for line in header if line.startswith("   ") and re.match(r" +(make|alignkd) ", line)
    ]
    assert header[0].strip() and commands
    for command in commands:
        check_line(command)
        assert file.stem in ("demo", "demo_study") or str(file.relative_to(ROOT)) in command


@pytest.mark.parametrize(
    ("name", "template", "aspect_ratio", "batch", "rate", "projector_rate"),
    [("pretrain", "plain", "square", 256, 2e-5, 1e-3), ("finetune", "v1", "pad", 128, 4e-5, 4e-5)],
)
def test_the_recipe_has_the_published_numbers(name, template, aspect_ratio, batch, rate, projector_rate):
    config = _recipe(name)
    train = config.train
    assert (config.data.template, config.data.image_aspect_ratio) == (template, aspect_ratio)
    assert config.data.max_length == 2048
    steps = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    assert NUM_GPUS * steps == batch
    assert (train["learning_rate"], config.student.projector_learning_rate) == (rate, projector_rate)
    assert (train["lr_scheduler_type"], train["warmup_steps"]) == ("cosine", 0.03)
    assert (train["num_train_epochs"], train["weight_decay"], train["bf16"]) == (1, 0.0, True)
    assert config.student.gradient_checkpointing
    assert config.teacher.model == "mtgv/MobileVLM_V2-7B"


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_recipe_uses_all_losses_of_align_kd_as_the_study_supports_them(name: str):
    losses = _recipe(name).losses.active()
    as_published = dict.fromkeys(("supervised", "attention", "vision_all", "vision_focus"), 1.0)
    assert {loss: settings.weight for loss, settings in losses.items()} == as_published | {"logits": 0.1}
    assert (losses["attention"].distance, losses["attention"].heads) == ("kl", "mean")
    assert losses["vision_focus"].k == 16


def test_the_paper_differs_from_finetuning_in_its_losses_and_what_they_need():
    paper, ours = (_recipe(name).model_dump() for name in ("paper", "finetune"))
    differ = {key for key in paper if paper[key] != ours[key]}
    assert differ <= {"output_dir", "cache", "targets", "losses"}
    losses = _recipe("paper").losses.active()
    assert {settings.weight for settings in losses.values()} == {1.0}
    assert (losses["attention"].distance, losses["attention"].heads) == ("mse", "mix")
    assert losses["attention"].layers == [(0, 0)] and losses["vision_focus"].k == 16
    assert (losses["logits"].direction, losses["logits"].temperature) == ("reverse", 1.0)


def test_finetuning_starts_where_pretraining_ends():
    assert _recipe("finetune").student.model == f"{_recipe('pretrain').output_dir}/align_kd/model"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_what_a_reader_must_fill_in_is_marked(file: Path):
    for line in file.read_text().splitlines():
        if "FILL_IN" in line:
            assert "# FILL IN" in line, line


@pytest.mark.parametrize("name", ["qwen3_vl/8b_to_2b", "llava/13b_to_7b", "smolvlm2/2.2b_to_500m"])
def test_a_recipe_of_another_family_uses_the_losses_that_its_pair_allows(name: str):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    ours = _recipe("finetune")
    assert config.data.template == "chat" and config.student.gradient_checkpointing and config.train["bf16"]
    steps = config.train["per_device_train_batch_size"] * config.train["gradient_accumulation_steps"]
    assert NUM_GPUS * steps == 128
    if "smolvlm2" in name:  # 81 and 64 vision tokens a tile
        assert config.targets.active().keys() == {"logits"}
        assert config.losses.active().keys() == {"supervised", "logits"}
        assert config.one_cache.allow_mismatch == ["image_preprocessing"]
        assert config.losses.active()["logits"] == ours.losses.active()["logits"]
    else:
        assert (config.targets, config.losses) == (ours.targets, ours.losses)
        assert config.one_cache.allow_mismatch == []


def test_the_docs_name_every_loss_and_every_target():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    text = " ".join(page.read_text() for page in pages)
    for name in [*LOSSES, *TARGETS]:
        assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", text), f"no page names `{name}`"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_config_sets_no_key_twice(file: Path):
    assert _keys_set_twice(yaml.compose(file.read_text())) == []


def test_the_look_for_keys_set_twice_sees_one():
    assert _keys_set_twice(yaml.compose("a: {b: 1, c: 2, b: 3}")) == ["b"]


def _keys_set_twice(node: yaml.Node | None) -> list[str]:
    """YAML keeps the last of two equal keys and says nothing."""
    if isinstance(node, yaml.SequenceNode):
        return [key for item in node.value for key in _keys_set_twice(item)]
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [key.value for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    return twice + [key for _, value in node.value for key in _keys_set_twice(value)]
