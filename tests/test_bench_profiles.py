"""The bench of profiles at its quick size, and the profiles that docs/codecs.md shows: `python bench/profiles.py`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config.config import Config, load_config

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))
try:
    from profiles import BARS, PROFILES, STEPS, reference_bytes
    from reading_samples import SIZES
finally:
    sys.path.remove(str(BENCH))


def _of_the_page() -> dict[str, dict]:
    blocks = re.findall(
        r"```yaml\n# ([\w ]+):[^\n]*\n(.*?)```", (ROOT / "docs" / "codecs.md").read_text(), re.S
    )
    return {name: yaml.safe_load(text)["targets"] for name, text in blocks}


def _config(targets: dict) -> Config:
    config = load_config(ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml")
    return Config.model_validate(config.model_dump() | {"targets": targets})


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], dict]:
    output = tmp_path_factory.mktemp("bench") / "profiles.json"
    command = [sys.executable, str(BENCH / "profiles.py"), "--quick", "--output", str(output)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.split("\n\n")[0].splitlines()) == 1 + len(STEPS) * len(PROFILES)
    assert "synthetic" in process.stdout
    return {(row["step"], row["profile"]): row for row in json.loads(output.read_text())["rows"]}


def test_the_page_shows_the_profiles_that_are_measured():
    page = _of_the_page()
    assert page.keys() == {"small", "logits only"}
    for name, targets in page.items():
        assert _config(targets).targets == _config(PROFILES[name]).targets


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_loads_and_serves_every_loss(name: str):
    config = _config(PROFILES[name])
    assert config.targets.active().keys() == {"attention", "vision", "logits"}
    assert (config.targets.cached().keys() == {"logits"}) == (name == "logits only")


def test_the_default_profile_is_the_shipped_config():
    shipped = load_config(ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml")
    assert shipped.targets == _config(PROFILES["default"]).targets


def test_the_reference_computes_24_megabytes_a_sample_in_pretraining():
    found = reference_bytes(SIZES["full"], rows=190, positions_before=1)
    assert found == {"attention": 32 * 190 * 144 * 2, "vision": 144 * 4096 * 2, "logits": 335 * 32000 * 2}
    assert sum(found.values()) == 24_370_688


@pytest.mark.parametrize("step", STEPS)
def test_cheaper_profiles_take_fewer_bytes_and_err_more(rows, step: str):
    default, small, logits, each = (rows[step, name] for name in (*BARS, "every head"))
    assert small["times_smaller"] > default["times_smaller"] > each["times_smaller"]
    assert logits["array_bytes_per_sample"].keys() == {
        "input_ids", "labels", "logits/ids", "logits/log_probs", "logits/tail",
    }  # fmt: skip
    assert small["errors"]["vision"] == pytest.approx(8 * default["errors"]["vision"], rel=0.5)
    for row in (default, small, logits, each):
        assert row["bytes_per_sample"] == pytest.approx(
            sum(row["array_bytes_per_sample"].values()) + row["other_bytes_per_sample"]
        )
