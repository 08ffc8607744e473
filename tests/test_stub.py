"""The stub teacher equals the whole one, and reads nothing else of the checkpoint."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.model import TOWER_PREFIX
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.targets.targets import AttentionTarget, LogitsTarget, VisionTarget

LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3])
TOWER = f"{TOWER_PREFIX}vision_tower.vision_model."
EMBEDDINGS = "model.embed_tokens.weight"


def targets(layers=None, *, logits=False):
    asked = {"vision": VisionTarget()}
    if layers is not None:
        asked["attention"] = AttentionTarget(layers=layers)
    return asked | ({"logits": LogitsTarget()} if logits else {})


def load(folder, layers=None, *, logits=False, dtype=torch.float32):
    plan = plan_teacher(str(folder), targets=targets(layers, logits=logits))
    return load_teacher(plan, dtype=dtype, device=torch.device("cpu"))


def forward(teacher, batch):
    """Return the vision features 'G D', None without images, and the teacher's forward."""
    features = batch.encoded_by(teacher.encode_images)
    return None if features is None else features.flat, teacher.forward(batch, features)


def copy_with(folder, source, change):
    """A copy of the teacher whose weights went through `change`."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.fixture
def batch(make_batch):
    return make_batch(*LAYOUTS)


@pytest.mark.parametrize("layers", [[0], [0, 1], [2], [1, 3]])
def test_the_stub_equals_the_whole_teacher(layers, teacher_folder, batch):
    stub, whole = load(teacher_folder, layers), load(teacher_folder, layers, logits=True)
    assert stub.plan.is_stub and not whole.plan.is_stub
    (stub_vision, mine), (whole_vision, theirs) = forward(stub, batch), forward(whole, batch)
    torch.testing.assert_close(stub_vision, whole_vision, atol=1e-6, rtol=0)
    assert list(mine.attention) == list(theirs.attention) == layers
    for layer in layers:
        torch.testing.assert_close(mine.attention[layer], theirs.attention[layer], atol=1e-6, rtol=0)
        assert mine.attention[layer].max() > 0.3
    assert torch.equal(mine.slots.text, theirs.slots.text)
    assert mine.num_answers == theirs.num_answers == [2, 2, 2, 2]
    assert mine.answer_logits is None and theirs.answer_logits is not None


@torch.no_grad()
def test_the_stub_equals_eager_attention_of_the_published_model(teacher_folder, batch):
    stub = load(teacher_folder, [0, 2])
    model = MobileVLMForCausalLM.from_pretrained(teacher_folder, attn_implementation="eager").eval()
    vision, result = forward(stub, batch)
    features = model.get_image_features(batch.pixel_values).pooler_output
    torch.testing.assert_close(vision, features.flatten(0, 1), atol=1e-5, rtol=0)
    attentions = model(**batch.inputs(), output_attentions=True).attentions
    for layer, tapped in result.attention.items():
        for row, (text, vision_at) in enumerate(zip(result.slots.text, result.slots.vision, strict=True)):
            text, vision_at = text[text >= 0], vision_at[vision_at >= 0]
            block = attentions[layer][row][:, text][:, :, vision_at]
            mine = tapped[row, :, : len(text), : len(vision_at)]
            torch.testing.assert_close(mine, block, atol=1e-5, rtol=0)


@torch.no_grad()
def test_answer_logits_are_those_before_every_label(teacher_folder, batch):
    _, result = forward(load(teacher_folder, logits=True), batch)
    model = MobileVLMForCausalLM.from_pretrained(teacher_folder).eval()
    one_by_one = [model(**sample.inputs()).logits[0, -3:-1] for sample in batch.one_by_one()]
    torch.testing.assert_close(result.answer_logits, torch.cat(one_by_one), atol=2e-5, rtol=1e-4)


def test_a_sample_has_the_same_attention_alone_and_in_a_padded_batch(teacher_folder, batch):
    stub = load(teacher_folder, [0, 2])
    _, together = forward(stub, batch)
    for row, sample in enumerate(batch.one_by_one()):
        _, alone = forward(stub, sample)
        for layer, attention in alone.attention.items():
            rows, columns = attention.shape[2:]
            mine = together.attention[layer][row, :, :rows, :columns]
            torch.testing.assert_close(mine, attention[0], atol=1e-6, rtol=0)


def test_a_stub_of_layer_0_holds_exactly_these_tensors(teacher_folder):
    plan = plan_teacher(str(teacher_folder), targets=targets([0]))
    language_model = {
        EMBEDDINGS,
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    }
    projector = {
        f"model.mm_projector.{name}"
        for layer in ("mlp.mlp.0", "mlp.mlp.2", "peg.peg.0")
        for name in (f"{layer}.weight", f"{layer}.bias")
    }
    rest = set(plan.tensors) - language_model - projector
    assert language_model | projector < set(plan.tensors) and list(plan.tensors) == sorted(plan.tensors)
    assert all(name.startswith(TOWER) for name in rest)
    # Three tower layers, of which the last but one is selected; its class token and positions are embeddings.
    layers = {match[1] for name in rest if (match := re.search(r"encoder\.layers\.(\d+)\.", name))}
    assert layers == {"0", "1"} and not any("post_layernorm" in name for name in rest)
    assert len(rest) == 3 + 2 + 2 * 16


def test_a_deeper_stub_adds_whole_layers_below_and_three_tensors_of_its_own(teacher_folder):
    plans = {
        layers[-1]: set(plan_teacher(str(teacher_folder), targets=targets(layers)).tensors)
        for layers in ([0], [0, 2])
    }
    added = plans[2] - plans[0]
    assert {name.split(".")[2] for name in added} == {"0", "1", "2"}
    assert {name.removeprefix("model.layers.2.") for name in added if ".2." in name} == {
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
    }
    assert len(added) == (9 - 3) + 9 + 3


def test_logits_need_every_tensor_that_the_forward_reads(teacher_folder):
    plan = plan_teacher(str(teacher_folder), targets=targets([0], logits=True))
    unused = load_file(teacher_folder / "model.safetensors").keys() - set(plan.tensors)
    assert unused and all(re.match(re.escape(TOWER) + r"(encoder\.layers\.2|post_lay)", n) for n in unused)


@pytest.mark.parametrize("layers", [None, [0], [2]])
def test_what_is_not_needed_stays_on_the_meta_device(layers, teacher_folder):
    stub = load(teacher_folder, layers)
    loaded = {name for name, p in stub.vlm.network.named_parameters() if p.device.type != "meta"}
    assert loaded == set(stub.plan.tensors)
    assert not any(p.requires_grad for p in stub.vlm.network.parameters()) and not stub.vlm.network.training


def test_the_vision_target_alone_needs_no_embeddings(teacher_folder, batch):
    stub, whole = load(teacher_folder), load(teacher_folder, [0], logits=True)
    assert EMBEDDINGS not in stub.plan.tensors and stub.device.type == "cpu"
    (vision, mine), (their_vision, theirs) = forward(stub, batch), forward(whole, batch)
    torch.testing.assert_close(vision, their_vision, atol=1e-6, rtol=0)
    assert torch.equal(mine.slots.text, theirs.slots.text) and mine.attention == {}
    assert torch.equal(mine.slots.vision, theirs.slots.vision) and mine.num_answers == theirs.num_answers


@pytest.mark.parametrize("layers", [None, [0], [0, 1]])
def test_a_batch_of_text_alone_has_no_rows(layers, teacher_folder, make_batch):
    _, result = forward(load(teacher_folder, layers), make_batch([4], [7]))
    assert all(attention.shape == (2, 4, 0, 0) for attention in result.attention.values())
    assert result.num_answers == [2, 2]


def test_tensors_that_are_not_needed_may_hold_anything_or_be_absent(teacher_folder, batch, tmp_path):
    stub = load(teacher_folder, [1])
    used = set(stub.plan.tensors)

    def spoil(weights):
        return {n: t if n in used else torch.full_like(t, float("nan")) for n, t in weights.items()}

    def drop(weights):
        return {n: t for n, t in weights.items() if n in used}

    vision, result = forward(stub, batch)
    for name, change in (("spoilt", spoil), ("cut", drop)):
        other = load(copy_with(tmp_path / name, teacher_folder, change), [1])
        other_vision, other_result = forward(other, batch)
        assert torch.equal(other_vision, vision)
        assert torch.equal(other_result.attention[1], result.attention[1])
        assert other.plan.digest == stub.plan.digest


def test_the_digest_is_of_the_tensors_used_whatever_the_file(teacher_folder, tmp_path):
    def digest(folder, layers=(0,), **options):
        return plan_teacher(str(folder), targets=targets(list(layers), **options)).digest

    def altered(name):
        folder = tmp_path / name
        return copy_with(folder, teacher_folder, lambda w: w | {name: w[name] + 1e-3})

    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    shutil.copy(teacher_folder / "config.json", bin_folder)
    torch.save(load_file(teacher_folder / "model.safetensors"), bin_folder / "pytorch_model.bin")
    mine = digest(teacher_folder)
    assert digest(bin_folder) == mine
    assert (
        digest(altered("lm_head.weight")) == digest(altered("model.layers.0.self_attn.v_proj.weight")) == mine
    )
    for used in (EMBEDDINGS, "model.layers.0.self_attn.k_proj.weight", f"{TOWER}pre_layrnorm.bias"):
        assert digest(altered(used)) != mine
    assert len({mine, digest(teacher_folder, [1]), digest(teacher_folder, logits=True)}) == 3


def test_a_needed_tensor_that_is_missing_is_named_before_anything_is_loaded(teacher_folder, tmp_path):
    lost = "model.layers.0.self_attn.q_proj.weight"
    folder = copy_with(tmp_path / "lost", teacher_folder, lambda w: {n: t for n, t in w.items() if n != lost})
    with pytest.raises(ConfigError, match=f"the checkpoint has no tensor '{lost}'"):
        plan_teacher(str(folder), targets=targets([0]))
    assert plan_teacher(str(folder), targets=targets()).is_stub


def test_the_types_asked_for_are_those_of_the_loaded_tensors(teacher_folder, tmp_path, batch):
    half = copy_with(
        tmp_path / "half", teacher_folder, lambda w: {n: t.to(torch.bfloat16) for n, t in w.items()}
    )
    stub = load(half, [0])
    assert {p.dtype for p in stub.vlm.network.parameters() if p.device.type != "meta"} == {torch.float32}
    vision, result = forward(load(teacher_folder, [0, 2], dtype=torch.bfloat16), batch)
    assert vision.dtype == torch.bfloat16 and result.attention[2].dtype == torch.float32
    _, full = forward(load(teacher_folder, [0]), batch)
    torch.testing.assert_close(result.attention[0], full.attention[0], atol=0.1, rtol=0)


@torch.no_grad()
def test_a_stub_beside_a_student_under_autocast_computes_in_its_own_dtype(teacher_folder, batch):
    stub = load(teacher_folder, [0, 1])
    sizes = [size for of_sample in batch["sizes"] for size in of_sample]
    patches = stub.vlm.patch_features(batch["images"])
    vision, result = forward(stub, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same_vision, same = forward(stub, batch)
        projected = stub.encode_images((), sizes, patch_features=patches).flat
    assert torch.equal(same_vision, vision) and torch.equal(projected, vision)
    assert all(torch.equal(same.attention[layer], block) for layer, block in result.attention.items())


@torch.no_grad()
def test_a_teacher_whose_head_is_its_embedding_works_whole(tiny_model, batch, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    teacher = load(tmp_path, [0], logits=True)
    _, result = forward(teacher, batch)
    wanted = model(**batch.inputs()).logits[:, :-1][batch["labels"][:, 1:] >= 0]
    torch.testing.assert_close(result.answer_logits, wanted, atol=2e-5, rtol=1e-4)


def test_a_plan_can_be_loaded_again(teacher_folder, batch):
    plan = plan_teacher(str(teacher_folder), targets=targets([0, 2]))
    first, again = (load_teacher(plan, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    _, expected = forward(first, batch)
    _, found = forward(again, batch)
    assert torch.equal(found.attention[2], expected.attention[2]) and plan.config.num_hidden_layers == 4
