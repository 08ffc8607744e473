"""`alignkd inspect layers`: which layers look at the image, and `suggested` in place of a layer's number."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_experiment import Experiment, shard_members, write_shard
from torch import Tensor

import cli
from pipeline.config.config import Config, load_config, to_yaml
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import pad_tokens
from pipeline.data.shards import Sample, read_shard
from pipeline.data.swapped_samples import with_images_of
from pipeline.errors import ConfigError
from pipeline.inspection.layer_table import _conclusion, layer_table
from pipeline.inspection.layers import LayerLook, LayerLooks, _Measurement, measure_layers, triples_of
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import last_prompt_positions


@pytest.fixture(scope="module")
def samples(experiment) -> list[Sample]:
    """Those with images."""
    read = [s for number in range(3) for s in read_shard(experiment.shard(number))]
    return [s for s in read if isinstance(s, Sample) and s.images]


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def row_of(vlm: VisionLanguageModel, item: Any, image_token_id: int) -> tuple[Tensor, Tensor]:
    """Return the last prompt position's attention to the vision tokens of one item, by transformers' eager code.

    'L J' over the whole row, and 'L J' over the vision tokens alone, means over heads of either.
    """
    tokens, images = item
    batch = pad_tokens([tokens], image_token_id)
    vlm.network.set_attn_implementation("eager")
    inputs = vlm.inputs(batch, vlm.encode(images, list(tokens.sizes)))
    with torch.no_grad():
        made = vlm.network(**inputs, use_cache=False, output_attentions=True).attentions
    at = int(last_prompt_positions(batch["labels"], batch["attention_mask"])[0])
    rows = torch.stack([layer[0, :, at][:, batch["is_vision"][0]] for layer in made])
    shares = rows / rows.sum(dim=2, keepdim=True).clamp(min=1e-9)
    return rows.mean(dim=1), shares.mean(dim=1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence to base 2, in float64."""
    p, q = p.double().clamp(min=1e-30), q.double().clamp(min=1e-30)
    middle = (p + q) / 2
    return sum(0.5 * (x * (x / middle).log()).sum(dim=1) for x in (p, q)) / math.log(2)  # pyright: ignore


def test_the_measures_are_those_of_eager_attention(experiment, samples):
    preparation = load_preparation(str(experiment.teacher), experiment.config(Path("unused")).data)
    vlm = VisionLanguageModel(load_network(str(experiment.teacher), dtype="float32").eval())
    triples = triples_of(samples, 64)
    found = iter(_Measurement(vlm, preparation).of(triples))
    compared = 0
    eager = VisionLanguageModel(load_network(str(experiment.teacher), dtype="float32").eval())
    for one, asking, other in triples:
        items = [with_images_of(preparation, *two) for two in ((one, one), (asking, one), (one, other))]
        (whole, own), (_, asked), (_, seen) = (
            row_of(eager, item, preparation.image_token_id) for item in items
        )
        if not all(bool(row.any()) for row in (own, asked, seen)):
            continue  # asked before any image is shown
        mine, compared = next(found), compared + 1
        torch.testing.assert_close(mine.on_image, whole.sum(dim=1), atol=1e-5, rtol=1e-4)
        for change, theirs in ((mine.by_question, asked), (mine.by_image, seen)):
            assert change is not None
            torch.testing.assert_close(change.double(), divergence(own, theirs), atol=1e-5, rtol=1e-3)
    assert compared >= 4 and next(found, None) is None


def test_the_other_question_is_about_the_same_images_where_there_is_one(samples):
    for one, asking, other in triples_of(samples, 64):
        assert asking.conversations[0] != one.conversations[0]
        assert one.image_digests != other.image_digests and len(one.images) == len(other.images)
        alike = [s for s in samples if s.image_digests == one.image_digests]
        if any(s.conversations[0] != one.conversations[0] for s in alike):
            assert asking.image_digests == one.image_digests


def looks(*scores: tuple[float, float], questions: int = 20, wipe_layer: int | None = None) -> LayerLooks:
    made = [LayerLook(n, share, moved, 0.1) for n, (share, moved) in enumerate(scores)]
    return LayerLooks("teacher", made, questions, 20, wipe_layer)


def test_the_layer_is_suggested_whose_attention_the_question_moves_most():
    scores = ((0.9, 0.1), (0.5, 0.6), (0.01, 0.9), (0.9, 0.5))
    assert looks(*scores).suggested == 3
    assert looks(*scores, wipe_layer=3).suggested == 1  # layer 3 sees no image in a pruned model
    few = looks(*scores, questions=7)
    assert few.suggested is None and few.why == "7 images with two questions were found, and 8 are needed"
    assert json.loads(few.to_json())["suggested"] is None
    assert "1 <  " in layer_table(looks(*scores, wipe_layer=3))
    assert "the one of those before the twig's wipe_layer 3 whose" in _conclusion(
        looks(*scores, wipe_layer=3)
    )


def test_the_command_prints_the_layers_and_writes_them_beside_the_store(experiment, tmp_path, capsys):
    given = [f"cache.path={tmp_path}/own.zarr", "targets.query_attention={layer: suggested}"]
    more = [shutil.copy(tar, tmp_path / f"more-{tar.name}") for tar in experiment.held_out.glob("*.tar")]
    every = [*experiment.shards.glob("*.tar"), *more]
    given += [f"data.shards=[{', '.join(map(str, every))}]"]
    assert run_command("inspect", "layers", "--config", experiment.file, *given) == 0
    said, file = capsys.readouterr().out, tmp_path / "own.zarr.layers.json"
    assert said.startswith("layer  attention on images") and said.endswith(f"{file}\n")
    record = json.loads(file.read_text())
    assert [look["layer"] for look in record["looks"]] == [0, 1, 2]
    assert all(0 < look["on_image"] < 1 and 0 < look["by_image"] < 1 for look in record["looks"])
    config = load_config(experiment.file, [f"output_dir={tmp_path}", *given])
    assert config.targets.active()["query_attention"].layer == record["suggested"]


def test_of_few_images_none_is_suggested_and_the_reason_is_said(experiment, tmp_path, capsys):
    output = tmp_path / "layers.json"
    assert (
        run_command("inspect", "layers", "--config", experiment.file, "--samples", 3, "--output", output) == 0
    )
    assert "no layer is suggested: " in capsys.readouterr().out
    assert "images with two questions were found, and 8 are needed" in json.loads(output.read_text())["why"]


def test_samples_without_images_are_refused(experiment, tmp_path):
    every = [member for n in range(3) for member in shard_members(experiment.shard(n))]
    with_image = {name.split(".")[0] for name, _ in every if not name.endswith(".json")}
    text = [(name, data) for name, data in every if name.split(".")[0] not in with_image]
    assert text
    write_shard(tmp_path / "text.tar", text)
    with pytest.raises(ConfigError, match=r"no two samples with images and different answers were found"):
        measure_layers(experiment.config(tmp_path, f"data.shards={tmp_path}/text.tar"), num_samples=4)


# `suggested`


@pytest.fixture
def measured(experiment, tmp_path) -> Experiment:
    """An experiment of which layer 1 was suggested, beside a store of its own."""
    (tmp_path / "own.zarr.layers.json").write_text(
        json.dumps({"teacher": str(experiment.teacher), "suggested": 1})
    )
    return experiment


def config_of(measured: Experiment, tmp_path: Path, *overrides: str) -> Config:
    return measured.config(tmp_path, f"cache.path={tmp_path}/own.zarr", *overrides)


def test_a_suggested_layer_is_a_number_wherever_the_teachers_layer_is_named(measured, tmp_path):
    config = config_of(
        measured,
        tmp_path,
        "targets.attention.layers=suggested",
        "targets.query_attention={layer: suggested}",
        "losses.attention.layers=[[suggested, 0]]",
        "losses.vision_focus.layer=suggested",
    )
    assert config.targets.active()["attention"].layers == [1]
    assert config.targets.active()["query_attention"].layer == 1
    assert config.losses.active()["attention"].layers == [(1, 0)]
    assert config.losses.active()["vision_focus"].layer == 1
    numbers = ["targets.attention.layers=[1]", "targets.query_attention={layer: 1}"]
    numbers += ["losses.attention.layers=[[1, 0]]", "losses.vision_focus.layer=1"]
    assert config == config_of(measured, tmp_path, *numbers)
    assert "suggested" not in to_yaml(config).replace(str(tmp_path), "")
    listed = config_of(measured, tmp_path, "targets.attention.layers=[0, suggested]", *numbers[1:])
    assert listed.targets.active()["attention"].layers == [0, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"a layer is `suggested`, but there is no .*own.zarr.layers.json; run `alignkd inspect layers"),
        ("{", r"own.zarr.layers.json is damaged; run `alignkd inspect layers"),
        ({"teacher": "another", "suggested": 1}, r"suggests a layer of the teacher another, not of .*teacher; run"),
        ({"teacher": "{teacher}", "suggested": None, "why": "too few"}, r"suggests no layer: too few; give a"),
        ({"teacher": "{teacher}", "suggested": 7}, r"asks for layer 7, but the teacher has layers 0 to 2"),
    ],
)  # fmt: skip
def test_a_suggestion_that_cannot_be_used_is_refused(record, message, experiment, tmp_path):
    file = tmp_path / "own.zarr.layers.json"
    if record is not None:
        text = record if isinstance(record, str) else json.dumps(record)
        file.write_text(text.replace("{teacher}", str(experiment.teacher)))
    from pipeline.teacher_cache.teacher import plan_capture

    with pytest.raises(ConfigError, match=message):
        plan_capture(config_of(experiment, tmp_path, "targets.query_attention={layer: suggested}"))
