"""`verify --fix`: what is damaged or missing is captured again, the rest is not touched, and nothing is silent."""

from __future__ import annotations

import shutil

import pytest
from small_experiment import snapshot
from small_store import flip_bit

import cli
from cache import FingerprintMismatch, summarise, verify
from pipeline.config.config import to_yaml
from pipeline.errors import ConfigError
from pipeline.upkeep.repair import repair_store

PART = "parts/shard-000001"


@pytest.fixture
def damaged(experiment, tmp_path):
    """A copy of the store with a flipped bit, a lost file and a lost part, and a config for it."""
    store = tmp_path / "store"
    shutil.copytree(experiment.store, store)
    flip_bit(store / PART / "vision" / "c" / "0", offset=20)
    (store / "parts" / "zarr.json").unlink()
    shutil.rmtree(store / "parts" / "shard-000002")
    return store, experiment.config(tmp_path, f"cache.path={store}")


def untouched(store):
    return snapshot(store / "parts" / "shard-000000")


def test_damaged_and_missing_parts_are_captured_again_and_no_others(damaged, experiment):
    store, config = damaged
    before = untouched(store)
    said: list[str] = []
    repair = repair_store(config, verify(store, deep=True), say=said.append)
    assert (repair.recaptured, repair.captured) == (("shard-000001",), ("shard-000002",))
    assert repair.report.problems == ()
    assert summarise(store).content == summarise(experiment.store).content
    assert untouched(store) == before


def test_a_lost_manifest_is_put_back_from_the_config(damaged, experiment):
    store, config = damaged
    (store / "manifest.json").write_text("{}")
    said: list[str] = []
    repair = repair_store(config, verify(store, deep=True), say=said.append)
    assert (store / "manifest.json").is_file() and repair.report.problems == ()
    assert said == [f"{store}/manifest.json was lost or damaged; it is written again from the config"]
    assert summarise(store).content == summarise(experiment.store).content


@pytest.mark.parametrize("manifest_is_there", [True, False])
def test_another_config_removes_nothing(damaged, manifest_is_there):
    store, config = damaged
    if not manifest_is_there:
        (store / "manifest.json").unlink()
    before = snapshot(store)
    other = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 150})})
    expected = (
        (FingerprintMismatch, "capture")
        if manifest_is_there
        else (Exception, "written for a store of another fingerprint")
    )
    with pytest.raises(expected[0], match=expected[1]):
        repair_store(other, verify(store, deep=True), say=lambda line: None)
    assert snapshot(store) == before


def test_a_shard_that_the_config_does_not_name_is_asked_for(damaged, experiment):
    store, config = damaged
    data = config.data.model_copy(update={"shards": str(experiment.shard(0))})
    with pytest.raises(
        ConfigError, match=r"part shard-000001 is to be captured again, but data.shards names no"
    ):
        repair_store(
            config.model_copy(update={"data": data}), verify(store, deep=True), say=lambda line: None
        )


def test_the_command_tells_what_it_found_and_did(damaged, tmp_path, capsys):
    store, config = damaged
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", str(store), "--fix", "--config", str(file)])
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert "found checksum: parts/shard-000001/vision/c/0" in shown.err
    assert "1 damaged parts captured again: shard-000001\n1 missing parts captured: shard-000002" in shown.err
    assert shown.out.startswith(f"{store}: 0 problems in 3 parts")


def test_fixing_needs_a_config_and_a_config_is_for_fixing(experiment, capsys):
    for arguments in (["--fix"], ["--config", str(experiment.file)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["verify", str(experiment.store), *arguments])
        assert stopped.value.code == 2 and "--fix and --config go together" in capsys.readouterr().err
