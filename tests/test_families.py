"""Every family through the door: the conformance suite, and both stages by the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import family_images
import pytest
import tiny_families
import torch
from family_experiment import write_config
from transformers import AutoConfig, AutoModelForImageTextToText

from cache import Store
from cli import main
from pipeline.config.config import load_config
from pipeline.conformance.checks import CHECKS, Check
from pipeline.conformance.specimen import Specimen, specimen_of
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import pad_tokens
from pipeline.models.families import FAMILIES
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel

pytestmark = pytest.mark.slow

# LFM2-VL's image processor needs torchvision: its model is checked on inputs made by hand (below).
WITH_PROCESSOR = [family for family in tiny_families.FAMILIES if family != "lfm2_vl"]


def test_the_suite_knows_every_family_that_is_let_in():
    assert set(tiny_families.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", WITH_PROCESSOR)
def test_a_family_conforms(family, family_folder):
    specimen = specimen_of(family_folder(family))
    assert sum(len(sample.sizes) for sample in specimen.samples) >= 3
    assert failed(specimen) == []


def failed(specimen: Specimen) -> Sequence[Check]:
    return [result for check in CHECKS if not (result := check(specimen)).passed]


@pytest.mark.parametrize("family", WITH_PROCESSOR)
def test_both_stages_run_by_the_command_line(family, family_folder, family_shards, tmp_path):
    config = write_config(family, family_folder(family), family_shards, tmp_path)
    alignkd("teacher-cache", "--config", config)
    store = Store(tmp_path / "store")
    rejected = [reason for part in store.parts for _, reason in store.rejects(part)]
    # PaliGemma takes one exchange, and one sample has two.
    assert (len(store), len(rejected)) == ((5, 1) if family == "paligemma" else (6, 0)), rejected
    alignkd("distill", "--config", config)
    state = json.loads((tmp_path / "run" / "align_kd" / "trainer_state.json").read_text())
    terms = {
        name
        for line in state["log_history"]
        for name in line
        if name.startswith("loss/") and not name.endswith("_weighted")
    }
    assert terms == {
        f"loss/{name}" for name in ("supervised", "attention", "vision_all", "vision_focus", "logits")
    }
    alignkd("check", tmp_path / "store", "--samples", 4)
    key = next(iter(store.keys()))
    alignkd("inspect", "sample", tmp_path / "store", key)
    model = tmp_path / "run" / "align_kd" / "model"
    assert AutoModelForImageTextToText.from_pretrained(model) is not None
    assert generated(config, model)


def alignkd(*arguments: object) -> None:
    """Run a command line that must end well."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code


def generated(config: Path, model: Path) -> list[int]:
    """Return three greedy ids about an image, of the student as it was written."""
    preparation = load_preparation(str(model), load_config(config).data)
    vlm = VisionLanguageModel(load_network(str(model), dtype=torch.float32).eval())
    image = family_images.png(40, 28)
    prompt = preparation.prompt(
        [{"from": "human", "value": "<image>\nWhat is it?"}], preparation.sizes_of([image])
    )
    features = vlm.encode([preparation.preprocess(image)], prompt.sizes)
    batch = pad_tokens([prompt], preparation.image_token_id)
    return vlm.generate(batch, features, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0].tolist()


def first_losses(folder: Path) -> dict[str, float]:
    """Return the terms that the first step of a training logged."""
    state = json.loads((folder / "align_kd" / "trainer_state.json").read_text())
    return {name: value for name, value in state["log_history"][0].items() if name.startswith("loss/")}


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "gemma3"])
def test_recomputed_targets_are_the_stored_ones(family, family_folder, family_shards, tmp_path):
    config = write_config(family, family_folder(family), family_shards, tmp_path)
    exact = ["targets.attention.codec=float32", "targets.vision.codec=float32", "evaluate=null"]
    alignkd("teacher-cache", "--config", config, *exact)
    alignkd("distill", "--config", config, *exact)
    again = ["targets.attention.source=recompute", "targets.vision.source=recompute"]
    alignkd("distill", "--config", config, *exact, *again, f"output_dir={tmp_path}/again")
    assert first_losses(tmp_path / "again") == pytest.approx(first_losses(tmp_path / "run"), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_adapters_are_trained_with_the_projector_alone_and_merged(
    family, family_folder, family_shards, tmp_path
):
    config = write_config(family, family_folder(family), family_shards, tmp_path)
    lora = ["student.lora={rank: 2, target_modules: [q_proj, v_proj]}", "evaluate=null"]
    alignkd("teacher-cache", "--config", config)
    alignkd("distill", "--config", config, *lora)
    before, after = (
        load_network(str(folder), dtype=torch.float32).state_dict()
        for folder in (tmp_path / "student", tmp_path / "run" / "align_kd" / "model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    connector = VisionLanguageModel(
        load_network(str(tmp_path / "student"), dtype=torch.float32)
    ).connector_names
    adapted = {name for name in changed if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert adapted and changed <= adapted | connector


def refused(*arguments: object, capsys) -> str:
    """Run a command line that must be refused, and return what it says."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (2, 3)
    return capsys.readouterr().err


def test_two_families_share_vision_features_where_images_have_as_many_tokens(
    family_folder, family_shards, tmp_path, capsys
):
    """PaliGemma and LLaVA: 16 tokens an image here; their tokenizers, templates and processors differ."""
    config = write_config("llava", family_folder("paligemma"), family_shards, tmp_path)
    nothing = ["losses.attention=null", "losses.vision_focus=null", "losses.logits=null"]
    alone = ["targets.attention=null", "targets.logits=null", *nothing]
    alignkd("teacher-cache", "--config", config, *alone)
    capsys.readouterr()
    alignkd("distill", "--config", config, *alone)
    assert "allow_mismatch (stored -> mine): tokenizer" in capsys.readouterr().err
    assert first_losses(tmp_path / "run")["loss/vision_all"] > 0
    said = refused("teacher-cache", "--config", config, f"cache.path={tmp_path}/other", capsys=capsys)
    assert "losses.logits compares token by token" in said and "'paligemma'" in said and "'llava'" in said
    without = ["losses.logits=null", f"cache.path={tmp_path}/third", f"output_dir={tmp_path}/third-run"]
    alignkd("teacher-cache", "--config", config, *without)
    said = refused("distill", "--config", config, *without, capsys=capsys)
    assert "tokenizer" in said and "template" in said


def with_more_tokens(student: Path) -> None:
    """Replace a SmolVLM by one whose tiles have four times the vision tokens, as a student of another size has."""
    config = AutoConfig.from_pretrained(student)
    config.scale_factor = 1
    AutoModelForImageTextToText.from_config(config).save_pretrained(student)
    file = student / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_seq_len": 4 * settings["image_seq_len"]}))


def test_a_student_that_sees_images_otherwise_learns_from_the_answers_alone(
    family_folder, family_shards, tmp_path, capsys
):
    """As SmolVLM2 of 2.2B and 500M: one tokenizer, other numbers of vision tokens."""
    config = write_config("smolvlm", family_folder("smolvlm"), family_shards, tmp_path)
    with_more_tokens(tmp_path / "student")
    said = refused("teacher-cache", "--config", config, capsys=capsys)
    assert "losses.attention compares images token by token" in said
    answers = [f"losses.{name}=null" for name in ("attention", "vision_all", "vision_focus")]
    alignkd("teacher-cache", "--config", config, *answers)
    said = refused("distill", "--config", config, *answers, capsys=capsys)
    assert "image_preprocessing" in said
    alignkd("distill", "--config", config, *answers, "cache.allow_mismatch=[image_preprocessing]")
    assert first_losses(tmp_path / "run")["loss/logits"] > 0
