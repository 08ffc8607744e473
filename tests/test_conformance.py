"""The suite finds what it is there to find, and a student that is the teacher has no loss."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import family_specimens
import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file

from cli import main
from pipeline.conformance import checks
from pipeline.conformance.checks import CHECKS
from pipeline.conformance.specimen import Specimen, specimen_of
from pipeline.distill.model.distiller import Distiller
from pipeline.errors import ConfigError
from pipeline.losses.losses import LOSSES
from pipeline.models import tap
from pipeline.models.configuration import read_config
from pipeline.models.families import FAMILIES
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.teacher_plan import plan_tensors, whole_model_digests
from pipeline.models.vlm import VisionLanguageModel
from pipeline.studies.scenes.models import model_config, write_checkpoint
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.vision import VisionTarget
from pipeline.teacher_cache.captured_arrays import captured_arrays

pytestmark = pytest.mark.slow

TARGETS = {
    "attention": AttentionTarget(layers=[0, 1], heads="each", codec="float32"),
    "vision": VisionTarget(codec="float32"),
    "logits": LogitsTarget(top_k=8, tail_samples=4),
}
SAME_FAMILY = {
    "attention": {"layers": [[0, 0], [1, 1]]},
    "vision_all": {},
    "vision_focus": {"k": 3},
    "logits": {"direction": "forward"},
}


@pytest.fixture(scope="module")
def specimens(family_folder) -> Callable[[str], Specimen]:
    @functools.cache
    def of(family: str) -> Specimen:
        return family_specimens.specimen_of_family(family, family_folder(family))

    return of


def test_lfm2_vl_conforms_on_inputs_made_by_hand(specimens):
    assert [result for check in CHECKS if not (result := check(specimens("lfm2_vl"))).passed] == []


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(family, specimens):
    specimen = specimens(family)
    layers = [0, 1] if specimen.num_attentions > 1 else [0]
    targets = TARGETS | {"attention": TARGETS["attention"].model_copy(update={"layers": layers})}
    settings = SAME_FAMILY | {"attention": {"layers": [[n, n] for n in layers]}}
    losses = {name: LOSSES[name].settings(**given) for name, given in settings.items()}
    batch = joined(specimen, targets)
    network = specimen.vlm.network.requires_grad_(True)
    facts = dict.fromkeys(targets, specimen.plan.facts)
    distiller = Distiller(network, losses, facts=facts)
    terms = distiller(batch)
    network.zero_grad(set_to_none=True)
    for name, (total, count) in terms.items():
        assert count > 0, name
        # The store's float16 of log probabilities; all else is exact.
        assert abs(float(total / count)) < (2e-3 if name == "logits" else 1e-6), name
    exact = sum(total for name, (total, _) in terms.items() if name != "logits")
    exact.backward()
    gradients = [p.grad.abs().max() for p in network.parameters() if p.grad is not None]
    assert gradients and float(max(gradients)) < 1e-4
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)


@torch.no_grad()
def joined(specimen: Specimen, targets) -> dict:
    """Return the batch that stage 2 would make of these samples, with what the teacher gives, not encoded."""
    batch, features = specimen.batch(), specimen.features()
    teacher = Teacher(specimen.vlm, replace(specimen.plan, targets=targets), torch.device("cpu"))
    keys = [str(n) for n in range(len(specimen.samples))]
    keep = list(features.tokens) if features else []
    samples, images = captured_arrays(teacher, targets, batch, features, keys=keys, keep=keep)
    numbers = iter(range(len(images)))
    for arrays, sample in zip(samples, specimen.samples, strict=True):
        arrays["vision"] = [images[next(numbers)]["vision"][0] for _ in sample.sizes]
    fields = {}
    for target in targets.values():
        fields |= target.collate(samples)
    received = {name: torch.tensor([t.rows_in(arrays) for arrays in samples]) for name, t in targets.items()}
    digests = [str(n) for n in range(len(images))]
    return batch | {
        "images": specimen.pixels(), "image_digests": digests, "is_filler": False,
        "targets": fields, "received": received, "lacking": {},
    }  # fmt: skip


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "qwen3_vl"])
def test_a_teacher_in_another_dtype_than_its_config_is_the_loaded_model(family, family_folder, tmp_path):
    """Gemma's scale of embeddings is a buffer in the model's dtype: that of the config would be off by 0.2%."""
    other = shutil.copytree(family_folder(family), tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["dtype"] = settings.get("text_config", settings)["dtype"] = "bfloat16"
    (other / "config.json").write_text(json.dumps(settings))
    specimen = specimen_of(other)
    whole = VisionLanguageModel(load_network(str(other), dtype=torch.float32).eval())
    plan = plan_tensors(Checkpoint(str(other)), read_config(other), {"logits": LogitsTarget()})
    teacher = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu")).vlm
    batch, sizes = specimen.batch(), [size for sample in specimen.samples for size in sample.sizes]
    with torch.no_grad():
        one, two = (
            vlm.forward(batch, vlm.encode(specimen.pixels(), sizes), answers=checks.answers_of(batch)).logits
            for vlm in (whole, teacher)
        )
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_tap_that_forgets_the_mask_is_found(specimens, monkeypatch):
    monkeypatch.setattr(tap, "_masked", lambda scores, kept, rows: scores)
    assert not checks.tap_equals_eager(specimens("llava"), on_the_left=False).passed


def test_a_causal_tap_is_found_where_images_see_both_ways(specimens, monkeypatch):
    masked = tap._masked

    def causal(scores, kept, rows):
        return masked(scores, tap.QueryAndKey(kept.query, kept.key, None, kept.scaling, True), rows)

    monkeypatch.setattr(tap, "_masked", causal)
    assert not checks.tap_equals_eager(specimens("paligemma"), on_the_left=False).passed
    assert not checks.tap_equals_eager(specimens("gemma3"), on_the_left=True).passed


def test_a_model_that_adds_after_the_scatter_is_found(specimens):
    """As a family would be that changes its features once more on the way to the decoder."""
    specimen = specimens("llava")
    get = specimen.vlm.network.get_image_features

    @functools.wraps(get)
    def scaled(*args, **kwargs):
        output = get(*args, **kwargs)
        output.pooler_output = [image * 1.01 for image in output.pooler_output]
        return output

    specimen.vlm.network.get_image_features = scaled
    try:
        assert not checks.features_given_equal_features_computed(specimen).passed
    finally:
        del specimen.vlm.network.get_image_features


def test_a_tap_outside_of_autograd_is_found(specimens, monkeypatch):
    specimen = specimens("llava")
    seen = []
    compute = tap.text_to_vision_attention

    def detached_later(kept, slots):
        seen.append(None)
        attention = compute(kept, slots)
        return attention if len(seen) <= specimen.num_attentions else attention.detach()

    monkeypatch.setattr(tap, "text_to_vision_attention", detached_later)
    assert not checks.gradients_survive_checkpointing(specimen).passed


def test_a_processor_of_another_model_is_told(family_folder, tmp_path):
    other = shutil.copytree(family_folder("smolvlm"), tmp_path / "other")
    file = other / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_seq_len": settings["image_seq_len"] + 1}))
    with pytest.raises(ConfigError, match=r"vision tokens of 4 images for which its processor writes"):
        specimen_of(other).features()


def test_images_are_not_cut_elsewhere_though_the_total_fits(specimens):
    """Two images of 54 and 60 tokens: a `view(-1, 57)` would give each a part of the other."""
    specimen = specimens("qwen3_vl")
    pixels = specimen.pixels([1])
    assert [len(image) for image in specimen.vlm.encode(pixels, [54, 60]).tokens] == [54, 60]
    for wrong in ([57, 57], [60, 54]):
        with pytest.raises(ConfigError, match=r"makes \[54, 60\] vision tokens of 2 images"):
            specimen.vlm.encode(pixels, wrong)


def changed(folder: Path, target: Path, change) -> Path:
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def misnamed(tensors) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))
    tensors[name.replace("q_proj", "query")] = tensors.pop(name)


def test_a_misnamed_tensor_ends_the_check(family_folder, tmp_path, capsys):
    wrong = changed(family_folder("llava"), tmp_path / "wrong", misnamed)
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(wrong)])
    printed = capsys.readouterr().out
    assert ended.value.code == 1
    assert "FAILED the checkpoint lacks 1 tensors" in printed and "query.weight" in printed


def test_a_tensor_of_another_shape_ends_the_check(family_folder, tmp_path, capsys):
    def narrowed(tensors) -> None:
        name = next(
            name for name in sorted(tensors) if "layers.3." in name and name.endswith("q_proj.weight")
        )
        tensors[name] = tensors[name][:-8].contiguous()

    wrong = changed(family_folder("qwen2_5_vl"), tmp_path / "wrong", narrowed)
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(wrong)])
    assert ended.value.code == 1
    assert "q_proj.weight [24, 32], not [32, 32]" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_student_with_a_misnamed_tensor_is_not_loaded(family, family_folder, tmp_path):
    wrong = changed(family_folder(family), tmp_path / "wrong", misnamed)
    with pytest.raises(ValueError, match="lacks 1 tensors of the model"):
        load_network(str(wrong), dtype="float32")


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "smolvlm"])
def test_the_digests_of_a_whole_model_are_those_of_its_store(family, family_folder):
    checkpoint = Checkpoint(str(family_folder(family)))
    plan = plan_tensors(checkpoint, read_config(checkpoint.folder), {"logits": LogitsTarget()})
    known = checkpoint.tensor_digests(checkpoint.names())
    assert whole_model_digests(checkpoint.folder, known) == plan.digests


@pytest.mark.parametrize("family", ["internvl", "mobilevlm"])
def test_a_sound_checkpoint_passes(family, family_folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(family_folder(family))])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "FAILED" not in printed and printed.count("ok ") == 3 + len(CHECKS)


def test_a_mobilevlm_with_smollm2s_special_tokens_is_checked_with_its_template(tmp_path, capsys):
    write_checkpoint(MobileVLMForCausalLM(model_config()), tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(tmp_path)])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "FAILED" not in printed and printed.count("ok ") == 3 + len(CHECKS)


def test_a_family_that_is_not_let_in_is_refused_with_what_to_run(family_folder, monkeypatch, capsys):
    known = family_folder("idefics3")
    monkeypatch.delitem(FAMILIES, "idefics3")
    with pytest.raises(ValueError, match=r"'idefics3' is not let in; run `alignkd models check .*idefics3`"):
        load_network(str(known), dtype="float32")
    with pytest.raises(SystemExit):
        main(["models", "check", str(known)])
    printed = capsys.readouterr().out
    assert "not let in" in printed and "FAILED it cannot be run: RuntimeError" in printed


def test_paligemma_2_is_refused_in_a_sentence(family_folder, tmp_path, capsys):
    """It has PaliGemma's model type, and a text part whose attention has a soft cap."""
    other = shutil.copytree(family_folder("paligemma"), tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["text_config"]["model_type"] = "gemma2"
    (other / "config.json").write_text(json.dumps(settings))
    capsys.readouterr()  # what writing the checkpoint printed
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(other)])
    [said] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert (
        "'paligemma' was asked for with a text part of type 'gemma2', whose attention does not run on" in said
    )


def test_a_family_that_needs_no_row_of_its_own_is_told_how_to_get_in(family_folder, monkeypatch, capsys):
    known = family_folder("llava")
    monkeypatch.delitem(FAMILIES, "llava")
    with pytest.raises(SystemExit) as ended:
        main(["models", "check", str(known)])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "to let it in, add 'llava' to FAMILIES" in printed


def test_the_list_of_families_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["models", "list"])
    assert capsys.readouterr().out.split() == sorted(FAMILIES)
