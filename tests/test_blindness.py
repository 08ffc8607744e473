"""The blindness alarm: a teacher whose answers do not depend on the images is reported before it is captured."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import yaml
from family_experiment import write_config
from family_images import SIZES, png
from small_experiment import one, record, text

from cache import Span, Store
from cli import main
from pipeline.config.config import load_config
from pipeline.data.shards import Sample
from pipeline.data.swapped_samples import Pair, pairs_of
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.stub import load_teacher
from pipeline.packing.pack import pack
from pipeline.studies import demo
from pipeline.teacher_cache.blindness import FIELD, Blindness
from pipeline.teacher_cache.swapped_images import measure_blindness
from pipeline.teacher_cache.teacher import plan_capture

TEACHER = Path(__file__).parent.parent / demo.TEACHER
WARNING = "may be BLIND: its answers hardly depend on the images"
SEES = Blindness(pairs=48, right=-0.5, wrong=-1.5, advantage=1.0, low=0.7, high=1.3, right_wins=40)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two shards with the questions about 60 images of the demo."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    (folder / "train.json").write_text(json.dumps(demo.conversations("train", num_images=60)))
    pack(folder / "train.json", folder / "shards", image_folder=demo.easy_vqa_folder(), samples_per_shard=300)
    return folder / "shards"


def write_demo_config(folder: Path, shards: Path, teacher: Path = TEACHER, **settings: Any) -> Path:
    """Write the config of a store of logits. The student is the teacher itself: these tests train none."""
    config = {
        "output_dir": str(folder),
        "teacher": {"model": str(teacher), "batch_size": 64, "device": "cpu", **settings},
        "student": {"model": str(teacher)},
        "data": {"shards": str(shards / "shard-000000.tar"), "max_length": 128},
        "cache": {"path": str(folder / "store")},
        "targets": {"logits": {"top_k": 4}},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def damaged(folder: Path, part: str, *, is_random: bool) -> Path:
    """Write the demo's teacher with another part: zeros, or the weights of a new model."""
    model = MobileVLMForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    torch.manual_seed(1)
    new = MobileVLMForCausalLM(model.config).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(new[name] if is_random else torch.zeros_like(parameter))
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((TEACHER / "tokenizer.model").read_bytes())
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def measured(file: Path, *overrides: str) -> Blindness:
    plan = plan_capture(load_config(file, list(overrides)))
    teacher = load_teacher(plan.teacher, dtype=torch.float32, device=torch.device("cpu"))
    return measure_blindness(plan.config, plan.shards, plan.preparation, teacher)


@pytest.mark.slow
def test_the_demo_teacher_uses_the_images_and_the_store_says_so(shards, tmp_path, capsys):
    file = write_demo_config(tmp_path, shards)
    assert run("teacher-cache", "--config", file) == 0
    said = capsys.readouterr().err
    assert "use of the images: the right images add " in said and WARNING not in said
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()
    found = Blindness.from_json(Store(tmp_path / "store").manifest.provenance[FIELD])
    assert found.pairs >= 20 and found.low > 1 and found.right_wins > 0.8 * found.pairs and not found.is_blind

    assert run("info", tmp_path / "store") == 0
    assert f"image use   {found}" in capsys.readouterr().out
    assert run("info", tmp_path / "store", "--json") == 0
    assert json.loads(capsys.readouterr().out)["provenance"][FIELD] == found.to_json()

    assert run("check", tmp_path / "store", "--samples", 4, "--no-losses", "--json") == 0
    checked = json.loads(capsys.readouterr().out)["blindness"]
    assert checked == pytest.approx(found.to_json()) and checked["is_blind"] is False

    # A run that captures more does not measure again.
    assert run("teacher-cache", "--config", file, f"data.shards={shards}") == 0
    assert "use of the images" not in capsys.readouterr().err
    added = json.loads((tmp_path / "store" / "manifest.json").read_bytes())
    assert added["provenance"] == json.loads(manifest)["provenance"] and len(added["planned_parts"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "is_random"), [("vision_tower", True), ("mm_projector", False), ("mm_projector", True)]
)
def test_a_blind_teacher_is_reported_by_both_commands(part, is_random, shards, tmp_path, capsys):
    teacher = damaged(tmp_path / "teacher", part, is_random=is_random)
    file = write_demo_config(tmp_path, shards, teacher)
    assert run("teacher-cache", "--config", file) == 0
    said = capsys.readouterr().err
    assert f"WARNING: the teacher {teacher} {WARNING}" in said
    assert "teacher.blind_ok: true" in said and "The capture goes on" in said
    assert Store(tmp_path / "store").manifest.provenance[FIELD]["is_blind"] is True

    assert run("check", tmp_path / "store", "--samples", 4, "--no-losses") == 0
    shown = capsys.readouterr()
    assert WARNING in shown.err and "use of the images: the teacher may be BLIND" in shown.out
    assert run("check", tmp_path / "store", "--samples", 4, "--no-losses", "teacher.blind_ok=true") == 0
    assert WARNING not in capsys.readouterr().err

    # A resumed run warns again, by what the store says.
    assert run("teacher-cache", "--config", file, f"data.shards={shards}") == 0
    said = capsys.readouterr().err
    assert WARNING in said and "use of the images: " not in said


@pytest.mark.slow
def test_blind_ok_silences_the_warning_and_keeps_the_numbers(shards, tmp_path, capsys):
    teacher = damaged(tmp_path / "teacher", "mm_projector", is_random=False)
    assert run("teacher-cache", "--config", write_demo_config(tmp_path, shards, teacher, blind_ok=True)) == 0
    said = capsys.readouterr().err
    assert WARNING not in said and "use of the images: the teacher may be BLIND" in said
    known = Store(tmp_path / "store").manifest.provenance[FIELD]
    assert known["is_blind"] and abs(known["advantage"]) < 1e-4


@pytest.mark.slow
def test_two_measurements_are_equal_and_the_batch_size_changes_only_rounding(shards, tmp_path):
    file = write_demo_config(tmp_path, shards)
    again = [measured(file), measured(file), measured(file, "teacher.batch_size=3")]
    assert again[0] == again[1]
    assert again[2].to_json() == pytest.approx(again[0].to_json(), abs=1e-3)


def test_a_stub_is_not_measured(experiment, tmp_path, capsys):
    store = f"cache.path={tmp_path}/store"
    without = ["targets.logits=null", "losses.logits=null", store]
    assert run("teacher-cache", "--config", experiment.file, f"output_dir={tmp_path}", *without) == 0
    assert "use of the images: not measured: no logits are stored" in capsys.readouterr().err
    assert run("info", tmp_path / "store") == 0
    assert "image use   not measured: no logits are stored" in capsys.readouterr().out


def test_the_first_worker_measures_for_all(experiment, tmp_path, capsys):
    command = (
        "teacher-cache",
        "--config",
        experiment.file,
        f"cache.path={tmp_path}/store",
        "--world-size",
        2,
    )
    shard = f"data.shards={experiment.shard(0)}"
    assert run(*command, "--rank", 1, shard) == 0
    assert "use of the images" not in capsys.readouterr().err
    assert FIELD not in Store(tmp_path / "store").manifest.provenance
    assert run(*command, "--rank", 0) == 0
    assert "use of the images: not measured: " in capsys.readouterr().err
    assert FIELD in Store(tmp_path / "store").manifest.provenance


@pytest.mark.slow
def test_data_without_images_raise_no_alarm(shards, tmp_path, capsys):
    texts = [text(f"t{number}", f"What follows {number}?", str(number + 1)) for number in range(12)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    pack(tmp_path / "texts.json", tmp_path / "shards", image_folder=tmp_path)
    assert run("teacher-cache", "--config", write_demo_config(tmp_path, tmp_path / "shards")) == 0
    said = capsys.readouterr().err
    assert "use of the images: not measured: 0 samples with images and different answers" in said
    assert WARNING not in said


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in tiny_families.FAMILIES if family != "lfm2_vl"])
def test_teachers_of_every_family_are_measured_and_random_ones_are_blind(family, family_folder, tmp_path):
    """Images of three sizes: a swap changes the numbers of vision tokens of families that tile."""
    (tmp_path / "images").mkdir()
    for number in range(20):
        size = SIZES[number % len(SIZES)]
        (tmp_path / f"images/{number}.png").write_bytes(png(*size, seed=number))
    records = [one(f"s{n}", n, "What is it?", ("blue", "a line", "no")[n % 3]) for n in range(16)]
    if family != "paligemma":  # which takes one image
        records += [record(f"two{n}", [f"{n}.png", f"{n + 1}.png"], ["<image><image>Which?", str(n)])
                    for n in (16, 18)]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    pack(tmp_path / "records.json", tmp_path / "shards", image_folder=tmp_path / "images")
    found = measured(write_config(family, family_folder(family), tmp_path / "shards", tmp_path))
    assert found.pairs == (16 if family == "paligemma" else 18) and found.is_blind, found
    assert found.right < 0 and found.advantage == pytest.approx(found.right - found.wrong, abs=1e-5)
    assert found.low < found.high  # the other images change the answers' probabilities


# Pairs


def sample(key: str, answer: str, num_images: int = 1) -> Sample:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]
    digests = tuple(f"{key}/{number}" for number in range(num_images))
    return Sample(key, turns, (b"",) * num_images, digests, (), Span("", 0, 0), {})


def assert_swapped(pairs: list[Pair]) -> None:
    """Each sample gives its images once, to one with as many images and other answers."""
    assert sorted(one.key for one, _ in pairs) == sorted(other.key for _, other in pairs)
    assert len({one.key for one, _ in pairs}) == len(pairs)
    for one_, other in pairs:
        assert one_.conversations[-1] != other.conversations[-1] and len(one_.images) == len(other.images)


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_gives_its_images_once_to_one_with_another_answer(seed):
    chance = random.Random(seed)
    answers = chance.choices(["yes", "no", "red", "green"], weights=[4, 2, 1, 1], k=40)
    samples = [sample(f"k{n}", answer, 1 + n % 2) for n, answer in enumerate(answers)]
    pairs = pairs_of(samples)
    assert_swapped(pairs)
    for number in (1, 2):
        counts = Counter(one.conversations[-1]["value"] for one in samples if len(one.images) == number)
        most = max(counts.values())
        expected = min(counts.total(), 2 * (counts.total() - most))
        assert sum(len(one.images) == number for one, _ in pairs) == expected


def test_one_answer_for_all_gives_no_pair():
    assert pairs_of([sample(f"k{n}", "yes") for n in range(10)]) == []
    assert pairs_of([]) == []


# The rule


@pytest.mark.parametrize(
    ("advantage", "low", "is_blind"),
    [
        (1.0, 0.7, False),
        (0.05, 0.03, False),
        (1.0, 0.49, True),  # as large by chance, of a random tower
        (1.0, -0.2, True),
        (-1.0, -1.2, True),
        (0.0, 0.0, True),
        (0.012, 0.009, True),  # certain, but nothing
    ],
)
def test_an_advantage_must_be_certain_and_not_tiny(advantage, low, is_blind):
    found = replace(SEES, advantage=advantage, low=low)
    assert found.is_blind is is_blind
    assert Blindness.from_json(found.to_json()) == found
    assert ("BLIND" in str(found)) is is_blind


def test_what_was_not_measured_is_not_blind():
    found = Blindness(3, not_measured="3 samples were found")
    assert not found.is_blind and str(found) == "not measured: 3 samples were found"
