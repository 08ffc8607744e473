"""`python -m bench.profiles` and `bench.extrapolate`: profiles, bytes and operations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from bench import extrapolate
from bench.flops import Lengths, forward, stage_1, stage_2, stub
from bench.profiles import PROFILES, STEPS, measure, reference_bytes
from bench.synthetic import SIZES
from pipeline.config.config import Config, load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml"


def _config(targets: dict) -> Config:
    return Config.model_validate(load_config(SHIPPED).model_dump() | {"targets": targets})


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict]:
    return {(step, name): measure(step, name, SIZES["small"], 8) for step in STEPS for name in PROFILES}


def test_the_page_shows_the_profiles_that_are_measured():
    page = (ROOT / "docs" / "codecs.md").read_text()
    blocks = dict(re.findall(r"```yaml\n# ([\w ]+):[^\n]*\n(.*?)```", page, re.S))
    assert blocks.keys() == {"small", "logits only"}
    for name, text in blocks.items():
        assert _config(yaml.safe_load(text)["targets"]).targets == _config(PROFILES[name]).targets


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_loads_and_serves_every_loss(name: str):
    config = _config(PROFILES[name])
    assert config.targets.active().keys() == {"attention", "vision", "logits"}
    assert (config.targets.cached().keys() == {"logits"}) == (name == "logits only")


def test_the_default_profile_is_the_shipped_config():
    assert load_config(SHIPPED).targets == _config(PROFILES["default"]).targets


def test_the_reference_computes_24_megabytes_a_sample_in_pretraining():
    found = reference_bytes(SIZES["full"], rows=190, positions_before=1)
    assert found == 2 * (32 * 190 * 144 + 144 * 4096 + 335 * 32000) == 24_370_688


@pytest.mark.parametrize("step", STEPS)
def test_cheaper_profiles_take_fewer_bytes_and_err_more(rows, step: str):
    default, small, logits, each = (rows[step, name] for name in PROFILES)
    assert small["times smaller"] > default["times smaller"] > each["times smaller"]
    assert logits["array_bytes"].keys() == {
        "input_ids", "labels", "logits/ids", "logits/log_probs", "logits/tail",
    }  # fmt: skip
    assert small["vision error"] == pytest.approx(8 * default["vision error"], rel=0.5)
    for row in (default, small, logits, each):
        assert row["bytes a sample"] > sum(row["array_bytes"].values())


def test_the_full_models_cost_what_their_weights_say():
    weights = {
        "teacher": 32 * (4 * 4096**2 + 3 * 4096 * 11008),
        "student": 24 * (4 * 2048**2 + 3 * 2048 * 5632),
    }
    for role, of_layers in weights.items():
        assert forward("full", role, Lengths(335, 190, 190)).decoder == pytest.approx(
            2 * of_layers * 335, rel=0.03
        )


def test_training_is_three_forwards_of_what_is_trained_and_one_of_the_tower():
    sample = Lengths(335, 190, 190)
    student = forward("full", "student", sample)
    once = stage_2("full", sample, checkpointing=False)
    assert stage_2("full", sample) - once == student.decoder
    trained = student.projector + student.decoder + student.head + student.tap
    assert once == student.tower + 3 * trained


def test_a_stub_runs_neither_decoder_nor_head():
    sample = Lengths(300, 120, 60)
    teacher = forward("small", "teacher", sample)
    left = teacher.queries_and_keys  # of layer 0, the last that it runs
    assert stage_1("small", sample) - stub("small", sample) == teacher.decoder - left + teacher.head
    assert stub("small", sample) - stub("small", sample, with_tower=False) == teacher.tower


def test_bytes_before_compression_are_shapes_times_widths():
    tokens, logits = 2 * 4 * (1 + 144 + 190), 190 * (32 * (2 + 2) + 2)
    vision, attention = 4096 * 144 * 2, 190 * (144 + 2)
    assert extrapolate.stored_bytes("pretrain", "logits only") == tokens + logits
    assert extrapolate.stored_bytes("pretrain", "default") == tokens + logits + vision + attention


def test_bytes_of_longer_synthetic_samples_are_scaled_to_the_mean_length():
    arrays = {"vision": 1000.0, "attention/layer_0": 380.0, "logits/ids": 190.0}
    row = {"step": "pretrain", "text_rows": 380.0, "answers": 95.0, "array_bytes": arrays}
    assert extrapolate.compressed_bytes(row | {"bytes a sample": 1575.0}) == 1000 + 190 + 380 + 5


def test_the_page_is_made_of_measured_bytes_and_refuses_without(tmp_path, monkeypatch, rows, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"profiles\.json: no such file; run python -m bench\.profiles"):
        extrapolate.main()
    extrapolate.FIGURES.parent.mkdir(parents=True)
    extrapolate.FIGURES.write_text(json.dumps(list(rows.values())))
    extrapolate.main()
    printed = capsys.readouterr().out
    assert re.search(r"stage 1, all targets +4\.84 +4\.19 +16\.21 +28\.9\.\.48\.1", printed)
    assert re.search(r"the reference computes +24,370\.7 +20,689\.4 +80\.600", printed)
