"""What is said of a stored sample is what its shard and its store hold, and no teacher is opened for it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from small_experiment import rewrite_store, shard_members, stored_arrays, write_shard
from torch import Tensor

from cache import FingerprintMismatch, KeyNotInStore, Store
from cache.format.documents import document_bytes, read_document
from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import Sample, read_shard
from pipeline.errors import BadSample, ConfigError, JoinError, PipelineError
from pipeline.inspection.sample import attention_distance, inspect_sample, paired_layer, student_attention
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.positions import IGNORE_INDEX
from pipeline.studies.demo import write_tokenizer
from pipeline.teacher_cache.teacher import cache_teacher


@pytest.fixture(scope="module")
def originals(experiment) -> dict[str, Sample]:
    """Every sample of the shards, by key."""
    return {s.key: s for number in range(3) for s in read_shard(experiment.shard(number))}  # pyright: ignore


@pytest.fixture
def without_models(experiment, tmp_path) -> Config:
    """The experiment's config where neither a teacher nor a student is at hand."""
    names = [f"{model}.model={tmp_path}/nowhere/{model}" for model in ("teacher", "student")]
    return experiment.config(tmp_path, *names)


def rewrite_manifest(experiment, folder: Path, change) -> Path:
    """A copy of the store whose manifest says other things, with a right checksum."""
    store = Path(shutil.copytree(experiment.store, folder / "store"))
    record = read_document(store / "manifest.json")
    change(record)
    (store / "manifest.json").write_bytes(document_bytes(record))
    return store


# What is read


@pytest.mark.parametrize("key", ["a0", "t0", "two", "late", "apart", "d1"])
def test_a_sample_is_what_its_shard_and_its_store_hold(key, experiment, originals):
    seen, stored = inspect_sample(experiment.store, key), stored_arrays(experiment.store)[key]
    assert seen.key == key and seen.store == str(experiment.store) and seen.note == ""
    assert seen.conversations == originals[key].conversations
    assert seen.input_ids == tuple(stored["input_ids"]) and seen.labels == tuple(stored["labels"])
    assert len(seen.images) == len(originals[key].images)
    assert sorted(seen.attention) == [0, 1]


def test_the_tokens_together_are_the_text_of_the_conversation(experiment):
    seen = inspect_sample(experiment.store, "late")
    assert "".join(seen.tokens).endswith(
        " USER: What do you know? ASSISTANT: much</s> USER: <image><image><image><image> \n"
        "And of ? ASSISTANT: a teal shape</s>"
    )
    assert [seen.tokens[n] for n, i in enumerate(seen.input_ids) if i == IMAGE] == ["<image>"] * 4


def test_the_text_after_the_first_image_are_the_rows_of_the_attention(experiment):
    seen = inspect_sample(experiment.store, "apart")
    first = seen.input_ids.index(IMAGE)
    assert seen.text == tuple(n for n in range(first, len(seen.input_ids)) if seen.input_ids[n] != IMAGE)
    assert seen.attention[0].shape == (4, len(seen.text), 8)
    assert seen.sizes == (4, 4) and seen.grids == ((2, 2), (2, 2))
    assert seen.slots.vision[0, :4].tolist() == [first, first + 1, first + 2, first + 3]
    assert seen.slots.text[0].tolist() == list(seen.text)


def test_the_images_are_what_the_tower_reads(experiment, originals, tmp_path):
    preparation = load_preparation(str(experiment.teacher), experiment.config(tmp_path).data)
    seen = inspect_sample(experiment.store, "two")
    for image, data in zip(seen.images, originals["two"].images, strict=True):
        clip = preparation.images.clip
        mean, std = (torch.tensor(values)[:, None, None] for values in (clip.image_mean, clip.image_std))
        colours = preparation.preprocess(data)["pixel_values"][0] * std + mean
        shown = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert image.size == (56, 56)
        torch.testing.assert_close(shown, colours.clamp(0, 1), atol=0.5 / 255 + 1e-6, rtol=0)
        # 40 x 30 pixels were padded to a square with CLIP's mean colour.
        assert image.getpixel((28, 1)) == tuple(int(value * 255) for value in clip.image_mean)


def test_the_attention_is_the_stored_one_with_the_images_side_by_side(experiment):
    seen, stored = inspect_sample(experiment.store, "two"), stored_arrays(experiment.store)["two"]
    for layer in (0, 1):
        expected = np.concatenate(stored[f"attention/layer_{layer}"], axis=2).transpose(1, 0, 2)
        np.testing.assert_array_equal(seen.attention[layer].numpy(), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_focus_is_what_the_text_attends_most(layer, experiment):
    seen = inspect_sample(experiment.store, "apart", layer=layer, k=3)
    mass = seen.attention[layer].numpy().mean(axis=0).sum(axis=0).reshape(2, 4)
    assert [of_image.tolist() for of_image in seen.focus] == np.argsort(-mass, axis=1)[:, :3].tolist()


def test_the_focus_is_as_large_as_the_config_says_or_as_is_asked(experiment, tmp_path):
    def sizes(**options) -> list[int]:
        return [len(of_image) for of_image in inspect_sample(experiment.store, "a0", **options).focus]

    assert sizes() == [2]
    config = experiment.config(tmp_path, "losses.vision_focus=null")
    assert sizes(config=config) == [4]  # 16, of which it has 4
    assert sizes(config=config, k=1) == [1]
    with pytest.raises(ConfigError, match=r"k: expected a number of focus tokens from 1 on, found 0"):
        inspect_sample(experiment.store, "a0", k=0)


def test_an_answer_has_the_teachers_likeliest_tokens_beside_it(experiment, tmp_path):
    seen, stored = inspect_sample(experiment.store, "a2"), stored_arrays(experiment.store)["a2"]
    tokenizer = load_preparation(str(experiment.student), experiment.config(tmp_path).data).tokenizer
    trained = [n for n, label in enumerate(seen.labels) if label != IGNORE_INDEX]
    assert [answer.place for answer in seen.answers] == trained
    assert "".join(seen.tokens[n] for n in trained) == " a black circle and a line</s>"
    for answer, ids, log_probs in zip(
        seen.answers, stored["logits/ids"], stored["logits/log_probs"], strict=True
    ):
        texts, shares = zip(*answer.likeliest, strict=True)
        decoded = [tokenizer.decode([i]) for i in ids]  # without its space; a lone byte is no character
        assert all(d in ("\ufffd", text.removeprefix(" ")) for d, text in zip(decoded, texts, strict=True))
        assert shares == pytest.approx(np.exp(log_probs).tolist()) and list(shares) == sorted(shares)[::-1]


def test_a_text_alone_has_no_image_to_look_at(experiment):
    seen = inspect_sample(experiment.store, "t0")
    assert seen.images == () and seen.text == () and seen.focus == ()
    assert seen.attention[0].numel() == 0 and len(seen.answers) > 2


def test_what_the_store_does_not_keep_is_left_out(experiment, tmp_path):
    off = [f"{section}.{name}=null" for section in ("losses", "targets") for name in ("attention", "logits")]
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", "losses.vision_focus=null", *off)
    cache_teacher(config)
    seen = inspect_sample(tmp_path / "store", "a0")
    assert seen.attention == {} and seen.focus == ()
    assert seen.answers and all(answer.likeliest == () for answer in seen.answers)


# Where it is read from


def test_no_weight_is_opened(experiment, tmp_path):
    for model in ("teacher", "student"):
        shutil.copytree(getattr(experiment, model), tmp_path / model)
        (tmp_path / model / "model.safetensors").unlink()
    names = [f"{model}.model={tmp_path}/{model}" for model in ("teacher", "student")]
    config = experiment.config(tmp_path, *names)
    assert inspect_sample(experiment.store, "a0", config=config).tokens[-1] == "</s>"


def test_the_teachers_tokenizer_serves_where_there_is_no_student(experiment, tmp_path):
    config = experiment.config(tmp_path, f"student.model={tmp_path}/nowhere")
    assert (
        inspect_sample(experiment.store, "a0", config=config).tokens
        == inspect_sample(experiment.store, "a0").tokens
    )


def test_a_model_of_the_hub_serves_if_it_was_downloaded_before(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--student"
    shutil.copytree(experiment.student, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    config = experiment.config(tmp_path, "student.model=some/student", "teacher.model=other/teacher")
    seen = inspect_sample(experiment.store, "a0", config=config)
    assert seen.note == "" and seen.tokens[-1] == "</s>"


def test_without_a_tokenizer_the_ids_stand_in_place_of_the_text(experiment, without_models):
    seen = inspect_sample(experiment.store, "a0", config=without_models)
    ids = tuple("<image>" if number == IMAGE else str(number) for number in seen.input_ids)
    assert seen.tokens == ids
    assert seen.note == (
        f"student.model {without_models.student.model} is not here; "
        f"teacher.model {without_models.teacher.model} is not here"
    )
    known = inspect_sample(experiment.store, "a0")
    assert seen.conversations == known.conversations and seen.images[0].size == (336, 336)
    assert all(torch.equal(seen.attention[layer], known.attention[layer]) for layer in (0, 1))
    assert seen.answers[-1].likeliest[0][0].isdigit()


def test_a_folder_without_a_tokenizer_is_told_in_the_note(experiment, tmp_path):
    for model in ("teacher", "student"):
        (tmp_path / model).mkdir()
        shutil.copy(experiment.student / "config.json", tmp_path / model)
    names = [f"{model}.model={tmp_path}/{model}" for model in ("teacher", "student")]
    seen = inspect_sample(experiment.store, "a0", config=experiment.config(tmp_path, *names))
    assert (
        seen.note.startswith(f"student.model: No tokenizer in {tmp_path}/student") and seen.tokens[0] == "1"
    )


def test_an_unknown_key_is_answered_with_keys_like_it(experiment):
    with pytest.raises(
        PipelineError, match=r"Sample key 'rares' is not among the 13 samples .* Keys like it: 'rare'\.$"
    ):
        inspect_sample(experiment.store, "rares")


def test_a_key_like_no_other_is_the_stores_own_error(experiment):
    with pytest.raises(KeyNotInStore, match=r"Sample key '?qqqq' is not among the 13 samples"):
        inspect_sample(experiment.store, "qqqq")


def test_a_layer_that_is_not_stored_is_answered_with_those_that_are(experiment):
    with pytest.raises(
        ConfigError, match=r"layer 2: .* keeps the attention of layers 0, 1; ask for one of these"
    ):
        inspect_sample(experiment.store, "a0", layer=2)


def test_shards_that_were_moved_are_asked_for(experiment, tmp_path):
    config = experiment.config(tmp_path, f"data.shards={tmp_path}/moved")
    with pytest.raises(
        ConfigError,
        match=r"sample 'a0' is in shard-000000.tar: looked in data.shards, .*moved, and found nothing "
        r"\(No shard at .*\); give a --config whose data.shards says where the shard is now",
    ):
        inspect_sample(experiment.store, "a0", config=config)


def test_other_shards_are_not_taken_for_the_samples_own(experiment, tmp_path):
    config = experiment.config(tmp_path, f"data.shards={experiment.shard(1)}")
    with pytest.raises(ConfigError, match=r"'a0' is in shard-000000.tar: .* found 1 shards of other names"):
        inspect_sample(experiment.store, "a0", config=config)
    assert inspect_sample(experiment.store, "c0", config=config).key == "c0"


def test_a_store_without_a_config_asks_for_one(experiment, tmp_path):
    store = rewrite_manifest(experiment, tmp_path, lambda record: record["provenance"].pop("config"))
    with pytest.raises(
        ConfigError, match=r"the config of stage 1 in its manifest, found none; give --config"
    ):
        inspect_sample(store, "a0")
    assert inspect_sample(store, "a0", config=experiment.config(tmp_path)).key == "a0"


def test_a_store_with_a_config_of_another_version_asks_for_one(experiment, tmp_path):
    store = rewrite_manifest(
        experiment, tmp_path, lambda record: record["provenance"]["config"].update(futuristic=True)
    )
    with pytest.raises(ConfigError, match=r"found one that this version does not read; give --config"):
        inspect_sample(store, "a0")


def test_a_student_with_another_tokenizer_leaves_the_reading_to_the_teacher(experiment, tmp_path):
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    write_tokenizer(student, [{"conversations": [{"from": "human", "value": "one two three " * 40}]}] * 20)
    config = experiment.config(tmp_path, f"student.model={student}")
    seen, as_stored = (
        inspect_sample(experiment.store, "a0", config=config),
        inspect_sample(experiment.store, "a0"),
    )
    assert seen.tokens == as_stored.tokens

    away = experiment.config(tmp_path, f"student.model={student}", f"teacher.model={tmp_path / 'gone'}")
    with pytest.raises(FingerprintMismatch, match=r"tokenizer: .* -> .*give a config whose `data` section"):
        inspect_sample(experiment.store, "a0", config=away)


# What changed after it was cached


def changed(experiment, folder: Path, name: str, change) -> str:
    """An override that names a copy of the first shard, in which one member has other bytes, as many."""
    members = [(n, change(data) if n == name else data) for n, data in shard_members(experiment.shard(0))]
    return f"data.shards={write_shard(folder / 'shard-000000.tar', members)}"


def test_another_image_is_refused(experiment, tmp_path):
    shards = changed(experiment, tmp_path, "a0.png", lambda data: data[:-20] + b"\0" + data[-19:])
    with pytest.raises(JoinError, match=r"sample 'a0' .*: image 'a0.png' has digest .*, the teacher saw"):
        inspect_sample(experiment.store, "a0", config=experiment.config(tmp_path, shards))


def test_another_text_is_refused(experiment, tmp_path):
    shards = changed(experiment, tmp_path, "a0.json", lambda data: data.replace(b"circle", b"square"))
    with pytest.raises(JoinError, match=r"sample 'a0' .*: its token ids are not those that the teacher saw"):
        inspect_sample(experiment.store, "a0", config=experiment.config(tmp_path, shards))


def test_a_text_that_is_none_any_more_is_refused_without_a_tokenizer_too(
    experiment, without_models, tmp_path
):
    shards = changed(experiment, tmp_path, "a0.json", lambda data: b"{}" + b" " * (len(data) - 2))
    data = without_models.data.model_copy(update={"shards": shards.removeprefix("data.shards=")})
    with pytest.raises(BadSample, match=r"no conversations"):
        inspect_sample(experiment.store, "a0", config=without_models.model_copy(update={"data": data}))


def test_a_sample_that_lost_rows_is_refused(experiment, tmp_path):
    def shorten(key, arrays):
        name = "attention/layer_1"
        return arrays | {name: [block[:-1] for block in arrays[name]]} if key == "a0" else arrays

    store = rewrite_store(experiment.store, tmp_path / "store", shorten)
    [block] = stored_arrays(experiment.store)["a0"]["attention/layer_1"]
    rows = len(block)
    with pytest.raises(
        JoinError,
        match=rf"sample 'a0': .* keeps {rows - 1} rows of attention to 4 vision tokens, .* for {rows} to 4",
    ):
        inspect_sample(store, "a0")


# Students


def eager_attention(folder: Path, seen, experiment, layer: int) -> Tensor:
    """'T J' of the whole model, from transformers' own eager attention, head mean."""
    model = MobileVLMForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    preparation = load_preparation(str(folder), seen.config.data)
    files = next(s for n in range(3) for s in read_shard(experiment.shard(n)) if s.key == seen.key).images
    pixels = torch.cat([preparation.preprocess(data)["pixel_values"] for data in files])
    ids = torch.tensor([seen.input_ids])
    with torch.no_grad():
        whole = model(ids, pixel_values=pixels, output_attentions=True).attentions[layer][0].mean(dim=0)
    return whole[list(seen.text)][:, ids[0] == IMAGE]


@pytest.mark.parametrize("key", ["a0", "two", "apart"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_students_attention_is_that_of_its_whole_model(key, layer, experiment):
    seen = inspect_sample(experiment.store, key)
    found = student_attention(seen, str(experiment.student), layer=layer)
    expected = eager_attention(experiment.student, seen, experiment, layer)
    assert found.dtype == torch.float32 and found.shape == (len(seen.text), 4 * len(seen.images))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_teacher_as_its_own_student_has_the_stored_attention(experiment):
    seen = inspect_sample(experiment.store, "two", layer=1)
    again = student_attention(seen, str(experiment.teacher), layer=1)
    torch.testing.assert_close(again, seen.attention[1].mean(dim=0), atol=1e-6, rtol=1e-5)
    assert attention_distance(seen, again) == pytest.approx(0, abs=1e-6)


def test_the_distance_is_the_kl_over_the_vision_tokens_and_the_rest(experiment):
    seen = inspect_sample(experiment.store, "a0")
    student = student_attention(seen, str(experiment.student), layer=0).double().tolist()
    teacher = seen.attention[0].double().mean(dim=0).tolist()
    per_row = []
    for theirs, ours in zip(teacher, student, strict=True):
        theirs, ours = [*theirs, 1 - sum(theirs)], [*ours, 1 - sum(ours)]
        per_row.append(sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True)))
    assert attention_distance(seen, torch.tensor(student)) == pytest.approx(np.mean(per_row), rel=1e-4)


def test_a_students_missing_layer_is_answered_with_those_it_has(experiment):
    seen = inspect_sample(experiment.store, "a0")
    with pytest.raises(ConfigError, match=r"layer 2: the student .* has layers 0 to 1; ask for one of these"):
        student_attention(seen, str(experiment.student), layer=2)


def test_a_student_with_other_vision_tokens_is_refused(experiment, tmp_path):
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    config = json.loads((student / "config.json").read_text()) | {"mm_projector_grid": 4}
    (student / "config.json").write_text(json.dumps(config))
    seen = inspect_sample(experiment.store, "a0")
    with pytest.raises(
        ConfigError,
        match=r"student .* makes 16 vision tokens of an image, the teacher of .* 4; compare a student",
    ):
        student_attention(seen, str(student), layer=0)


def test_a_student_that_reads_other_tokens_is_refused(experiment, tmp_path):
    student = Path(shutil.copytree(experiment.student, tmp_path / "student"))
    write_tokenizer(student, [{"conversations": [{"from": "human", "value": "one two three " * 40}]}] * 20)
    seen = inspect_sample(experiment.store, "a0")
    with pytest.raises(FingerprintMismatch, match=r"tokenizer: .* -> "):
        student_attention(seen, str(student), layer=0)


def test_the_config_of_stage_1_is_the_stores_own(experiment, tmp_path):
    seen = inspect_sample(experiment.store, "a0")
    assert seen.config.model_dump(mode="json") == Store(experiment.store).manifest.provenance["config"]


def test_the_layer_shown_has_its_student_layer_from_the_losses(experiment):
    inspection = inspect_sample(experiment.store, "a0")
    assert inspection.layer == 0 and paired_layer(inspection) == 0
    assert paired_layer(inspect_sample(experiment.store, "a0", layer=1)) == 1


def test_without_a_layer_the_one_that_the_losses_read_is_shown(experiment, tmp_path):
    deep = ["losses.attention.layers=[[1, 0]]", "losses.vision_focus.layer=1"]
    inspection = inspect_sample(experiment.store, "a0", config=experiment.config(tmp_path, *deep))
    assert inspection.layer == 1 and paired_layer(inspection) == 0
    [mine], [theirs] = inspection.focus, inspect_sample(experiment.store, "a0", layer=1).focus
    assert torch.equal(mine, theirs)


def test_a_layer_without_a_pair_asks_for_the_students(experiment, tmp_path):
    config = experiment.config(tmp_path, "losses.attention.layers=[[0, 0]]")
    with pytest.raises(ConfigError, match="pairs no student layer with the teacher's layer 1; say which one"):
        paired_layer(inspect_sample(experiment.store, "a0", config=config, layer=1))
