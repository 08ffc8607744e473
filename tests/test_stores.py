"""Several stores as one: each target from the store that gives it, each store what the config would have cached."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_experiment import rewrite_store, snapshot, stored_arrays
from small_mixture import another_teacher, losses_of, mixing, part_of_store

import cli
from cache import FingerprintMismatch, Store
from pipeline.config.config import labels_only, load_config, to_yaml
from pipeline.config.provenance import finished_identity
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinedDataset
from pipeline.distill.join.stores import open_stores
from pipeline.distill.parts import needed_targets
from pipeline.distill.student import train_student
from pipeline.errors import ConfigError, JoinError, PipelineError
from pipeline.sweep.identity import run_identity
from pipeline.teacher_cache.teacher import cache_teacher

STEPS = ["train.max_steps=4", "train.dataloader_num_workers=0"]
NO_VISION = ["losses.vision_all=null", "losses.vision_focus=null"]


@pytest.fixture(scope="module")
def stores(experiment, tmp_path_factory):
    """The experiment's store in three: attention, vision, logits."""
    folder = tmp_path_factory.mktemp("stores")
    names = ("attention", "vision", "logits")
    return {name: part_of_store(experiment.store, folder / name, [name]) for name in names}


@pytest.fixture(scope="module")
def of_other_teacher(experiment, tiny_model, tmp_path_factory):
    """The store of another teacher, of all targets."""
    folder = tmp_path_factory.mktemp("other")
    teacher = another_teacher(experiment, folder / "teacher", tiny_model)
    config = experiment.config(folder, f"teacher.model={teacher}", f"cache.path={folder}/store")
    cache_teacher(config)
    return folder / "store"


def opened(config) -> JoinedDataset:
    preparation = load_preparation(config.student.model, config.data)
    stores = open_stores(config, preparation)
    return JoinedDataset(stores, config.data.shards, preparation, targets=needed_targets(config))


# What comes from where


def test_targets_of_three_stores_give_the_losses_of_one_store_with_all_to_the_bit(
    experiment, stores, tmp_path
):
    one = losses_of(experiment.config(tmp_path, *STEPS), tmp_path / "one")
    for order in (("attention", "vision", "logits"), ("logits", "vision", "attention")):
        config = mixing(experiment, tmp_path, *(stores[name] for name in order), more=STEPS)
        assert losses_of(config, tmp_path / order[0]) == one
    assert len(one) == 4


def test_one_entry_is_the_store_itself(experiment, tmp_path):
    one = losses_of(experiment.config(tmp_path, *STEPS), tmp_path / "one")
    assert losses_of(mixing(experiment, tmp_path, experiment.store, more=STEPS), tmp_path / "entry") == one


def test_each_term_is_that_of_the_teacher_whose_store_gives_its_target(
    experiment, of_other_teacher, tmp_path
):
    mine = losses_of(experiment.config(tmp_path), tmp_path / "mine")[0]
    theirs = losses_of(experiment.config(tmp_path, f"cache.path={of_other_teacher}"), tmp_path / "theirs")[0]
    config = mixing(
        experiment,
        tmp_path,
        (experiment.store, ["logits"]),
        (of_other_teacher, ["attention", "vision"]),
    )
    mixed = losses_of(config, tmp_path / "mixed")[0]
    assert mixed["loss/logits"] == mine["loss/logits"] != theirs["loss/logits"]
    for name in ("attention", "vision_all", "vision_focus"):
        assert mixed[f"loss/{name}"] == theirs[f"loss/{name}"] != mine[f"loss/{name}"]


def test_each_head_is_as_wide_as_the_teacher_of_its_own_target(experiment, of_other_teacher, tmp_path):
    config = mixing(
        experiment,
        tmp_path,
        (of_other_teacher, ["attention"]),
        experiment.store,
        more=["train.save_strategy=steps", "train.save_steps=2"],
    )
    train_student(config, tmp_path / "run")
    from safetensors.torch import load_file

    heads = load_file(tmp_path / "run" / "checkpoint-2" / "heads.safetensors")
    assert heads["vision_map.weight"].shape == (24, 32)  # the experiment's teacher
    assert heads["head_mixer.scores"].shape == (2, 4, 6)  # the other's heads


def test_what_no_entry_names_comes_from_the_first_store_that_holds_it(experiment, of_other_teacher, tmp_path):
    def given(*caches):
        return [source.targets for source in opened(mixing(experiment, tmp_path, *caches)).stores.sources]

    other = (of_other_teacher, ["logits"])
    assert given(experiment.store, other) == [("attention", "vision"), ("logits",)]
    assert given(other, experiment.store) == [("logits",), ("attention", "vision")]


def test_a_store_may_hold_more_than_is_taken_from_it(experiment, of_other_teacher, tmp_path):
    """Also where what is not taken was captured otherwise: only that which is taken is compared."""
    otherwise = ["targets.logits.top_k=4", f"cache.path={tmp_path}/top_4"]
    cache_teacher(experiment.config(tmp_path, *otherwise))
    config = mixing(
        experiment, tmp_path, (tmp_path / "top_4", ["attention", "vision"]), (of_other_teacher, ["logits"])
    )
    assert len(opened(config)) == 13


NO_LOGITS = ["losses.logits=null", "targets.logits=null"]


def test_a_config_may_read_some_of_one_stores_targets(experiment, stores, tmp_path):
    some = losses_of(experiment.config(tmp_path, *NO_LOGITS, *STEPS), tmp_path / "some")
    sliced = part_of_store(experiment.store, tmp_path / "sliced", ["attention", "vision"])
    config = experiment.config(tmp_path, f"cache.path={sliced}", *NO_LOGITS, *STEPS)
    assert some == losses_of(config, tmp_path / "of_sliced") and "loss/logits" not in some[0]


@pytest.mark.parametrize("changes", [["targets.logits.top_k=4"], ["targets.logits.tail_samples=2"]])
def test_a_target_that_no_loss_reads_may_be_another_in_the_store(changes, experiment, stores, tmp_path):
    config = experiment.config(tmp_path, "losses.logits=null", *changes)
    train_student(config, tmp_path / "run")
    with pytest.raises(FingerprintMismatch, match=r"capture: targets\.logits\..* -> "):
        train_student(experiment.config(tmp_path, *changes), tmp_path / "other")


@pytest.mark.parametrize("changes", [["targets.vision.codec=float16"], ["data.max_length=100"]])
def test_what_a_loss_reads_must_be_as_it_was_captured_also_beside_others(changes, experiment, tmp_path):
    with pytest.raises(FingerprintMismatch, match=r"capture: (targets\.vision\.codec|max_length): .* -> "):
        train_student(experiment.config(tmp_path, *NO_LOGITS, *changes), tmp_path / "run")


def test_a_target_that_the_one_store_does_not_hold_is_refused_where_a_loss_reads_it(
    experiment, stores, tmp_path
):
    only_logits = f"cache.path={stores['logits']}"
    with pytest.raises(FingerprintMismatch, match=r"capture: targets\.attention: absent -> "):
        train_student(experiment.config(tmp_path, only_logits), tmp_path / "run")
    config = experiment.config(tmp_path, only_logits, *NO_VISION, "losses.attention=null")
    train_student(config, tmp_path / "run")


def test_every_sample_joins_its_arrays_of_every_store_also_after_pickling(experiment, stores, tmp_path):
    dataset = opened(mixing(experiment, tmp_path, *stores.values()))
    whole = stored_arrays(experiment.store)
    for joined in (dataset, pickle.loads(pickle.dumps(dataset))):
        for sample in (joined[index] for index in range(len(joined))):
            for name in ("attention/layer_0", "attention/layer_1", "vision", "logits/ids", "logits/tail"):
                assert np.array_equal(sample.arrays[name], whole[sample.key][name])
    assert [entry.key for _, entry in dataset.rows] == list(Store(experiment.store).keys())


def test_shards_that_were_packed_otherwise_for_one_store_are_joined_by_key(experiment, stores, tmp_path):
    """A part is a shard's, and a sample may lie in another one."""
    from small_experiment import shard_members, write_shard

    members = [member for number in range(3) for member in shard_members(experiment.shard(number))]
    write_shard(tmp_path / "shards" / "all.tar", members)
    config = experiment.config(tmp_path, f"data.shards={tmp_path}/shards", f"cache.path={tmp_path}/store")
    cache_teacher(config)
    dataset = opened(mixing(experiment, tmp_path, stores["attention"], tmp_path / "store"))
    whole = stored_arrays(experiment.store)
    assert len(dataset) == 13
    for sample in (dataset[index] for index in range(len(dataset))):
        assert np.array_equal(sample.arrays["logits/ids"], whole[sample.key]["logits/ids"])


# What is refused


def test_a_target_that_no_store_gives_is_named_with_what_the_stores_give(experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, stores["attention"], stores["vision"])
    with pytest.raises(
        ConfigError,
        match=r"losses.logits needs the target 'logits', which no store of `caches` gives: .*attention gives "
        r"attention, .*vision gives vision; add a store that holds it, or remove the loss",
    ):
        train_student(config, tmp_path / "run")


def test_a_target_that_no_loss_reads_need_not_be_given(experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, stores["attention"], stores["logits"], more=NO_VISION)
    train_student(config, tmp_path / "run")


def test_a_target_that_the_named_store_does_not_hold_is_refused(experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, stores["attention"], (stores["vision"], ["vision", "logits"]))
    with pytest.raises(
        ConfigError, match=r"caches.1.targets names 'logits', but .*vision holds vision; name one of these"
    ):
        train_student(config, tmp_path / "run")


def test_a_store_that_gives_nothing_is_refused(experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, experiment.store, stores["vision"])
    with pytest.raises(
        ConfigError, match=r"caches.1: .*vision has nothing to give: it holds vision, .*leave it out"
    ):
        train_student(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["data.template=plain"], "template"),
        (["targets.vision.codec=float16"], "capture"),
    ],
)
def test_each_store_is_held_against_the_config(overrides, field, experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, *stores.values(), more=overrides)
    with pytest.raises(FingerprintMismatch) as raised:
        train_student(config, tmp_path / "run")
    assert [difference.field for difference in raised.value.differences] == [field]
    where = stores["vision" if field == "capture" else "attention"]
    assert str(where) in str(raised.value)
    assert "allow_mismatch: [FIELD] of its entry of `caches` lets it differ" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_are_not_those_of_the_fingerprint_vouch_for_no_part_of_them(
    experiment, stores, tmp_path
):
    forged = rewrite_store(experiment.store, tmp_path / "forged", fingerprint={"capture": "0" * 64})
    config = mixing(experiment, tmp_path, (forged, ["attention"]), stores["vision"], stores["logits"])
    with pytest.raises(FingerprintMismatch, match=r"capture: targets.logits: .* -> absent"):
        train_student(config, tmp_path / "run")


def test_a_field_may_differ_in_one_store_which_is_told_and_recorded(experiment, stores, tmp_path, capsys):
    other = rewrite_store(stores["logits"], tmp_path / "logits", fingerprint={"template": "0" * 64})
    entries = [{"path": str(stores[name])} for name in ("attention", "vision")]
    entries.append({"path": str(other), "allow_mismatch": ["template"]})
    config = experiment.config(tmp_path, "cache=null", f"caches={json.dumps(entries)}")
    train_student(config, tmp_path / "run")
    assert f"caches.2.allow_mismatch (stored -> mine): template: {'0' * 64} -> " in capsys.readouterr().err
    (difference,) = json.loads((tmp_path / "run" / "provenance.json").read_text())["allowed_mismatches"]
    assert (difference["field"], difference["store"]) == ("template", str(other))


def swap_last(name):
    def change(key, arrays):
        if key == "b0":
            arrays[name] = arrays[name].copy()
            arrays[name][-1] += 1
        return arrays

    return change


@pytest.mark.parametrize(("name", "what"), [("input_ids", "token ids"), ("labels", "labels")])
def test_other_tokens_under_one_key_are_refused_with_both_stores(name, what, experiment, stores, tmp_path):
    other = rewrite_store(stores["logits"], tmp_path / "logits", swap_last(name))
    dataset = opened(mixing(experiment, tmp_path, stores["attention"], stores["vision"], other))
    with pytest.raises(
        JoinError,
        match=rf"sample 'b0': its {what} in {other} are not those in {stores['attention']} \(at position \d+: "
        r"there \d+, here \d+\); the stores were cached from different data: cache one of them again",
    ):
        [dataset[index] for index in range(len(dataset))]


def test_other_images_under_one_key_are_refused(experiment, stores, tmp_path):
    """The text is the same, so tokens alone would not tell."""
    from small_experiment import shard_members, write_shard

    for number in range(3):
        members = shard_members(experiment.shard(number))
        data = dict(members)
        changed = [(n, data["a0.png"] if n == "b0.png" else d) for n, d in members]
        shard = write_shard(tmp_path / "shards" / experiment.shard(number).name, changed)
        shutil.copystat(experiment.shard(number), shard)  # else the shard alone would tell
    overrides = [f"data.shards={tmp_path}/shards", f"cache.path={tmp_path}/store"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    dataset = opened(
        mixing(experiment, tmp_path, stores["attention"], (tmp_path / "store", ["vision", "logits"]))
    )
    with pytest.raises(JoinError, match=r"sample 'b0': its images in .*store are not those in .*attention"):
        [dataset[index] for index in range(len(dataset))]


def test_a_student_of_another_family_than_one_teacher_is_refused_with_its_store(
    experiment, stores, tiny_model, tmp_path
):
    teacher = tmp_path / "teacher"
    tiny_model(vocab_size=600).save_pretrained(teacher)
    shutil.copy(experiment.teacher / "tokenizer.model", teacher)
    here = [f"teacher.model={teacher}", f"student.model={teacher}", f"cache.path={tmp_path}/wide"]
    cache_teacher(experiment.config(tmp_path, *here))
    config = mixing(
        experiment, tmp_path, stores["attention"], stores["vision"], (tmp_path / "wide", ["logits"])
    )
    with pytest.raises(ConfigError, match=r"vocab_size is 512, the teacher of .*wide has 600"):
        train_student(config, tmp_path / "run")


def test_what_works_on_one_store_says_so_of_several(experiment, stores, tmp_path, capsys):
    config = mixing(experiment, tmp_path, *stores.values())
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    damaged = Path(shutil.copytree(stores["logits"], tmp_path / "damaged"))
    next((damaged / "parts" / "shard-000000").glob("*.jsonl")).unlink()
    for command in (
        ["teacher-cache"],
        ["plan"],
        ["check", stores["logits"]],
        ["verify", damaged, "--fix"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in [*command, "--config", file]])
        told = capsys.readouterr().err
        assert stopped.value.code == 2
        assert "alignkd: this works on one store, but the config names 3 (`caches`); give it a config" in told
    with pytest.raises(ConfigError, match="works on one store"):
        _ = config.one_cache


def test_allow_mismatch_on_the_command_line_is_of_one_store(experiment, stores, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(mixing(experiment, tmp_path, *stores.values())))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill", "--config", f"{tmp_path}/config.yaml", "--allow-mismatch", "template"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "each with its own path and allow_mismatch" in told


# What is recorded


def test_an_experiment_a_sweep_and_their_pages_from_several_stores(experiment, stores, tmp_path, capsys):
    config = mixing(experiment, tmp_path / "out", *stores.values(), more=["baseline=true"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    commands = (
        ["distill", "--config", f"{tmp_path}/config.yaml"],
        ["sweep", "--config", f"{tmp_path}/config.yaml", "--vary", "losses=none,all", "--jobs", "2"],
        ["report", f"{tmp_path}/out"],
        ["report", f"{tmp_path}/out/sweep"],
    )
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert stopped.value.code == 0, capsys.readouterr().err
    for page in (tmp_path / "out" / "report.html", tmp_path / "out" / "sweep" / "report.html"):
        assert "The runs read several stores (caches), so no one store is their cost." in page.read_text()


def test_a_config_of_several_stores_loads_back_to_itself(experiment, stores, tmp_path):
    config = mixing(experiment, tmp_path, stores["attention"], (stores["vision"], ["vision"]))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert labels_only(config).caches == config.caches


def test_the_record_of_a_run_has_every_store(experiment, stores, tmp_path):
    train_student(mixing(experiment, tmp_path, *stores.values()), tmp_path / "run")
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [(store["path"], store["targets"]) for store in made["stores"]] == [
        (str(path), [name]) for name, path in stores.items()
    ]
    fingerprint = Store(stores["vision"]).manifest.fingerprint.to_json()
    assert made["stores"][1]["fingerprint"] == fingerprint and made["missing"] == []


def test_a_run_is_done_again_when_one_of_its_stores_is_another(
    experiment, stores, of_other_teacher, tmp_path
):
    logits = Path(shutil.copytree(stores["logits"], tmp_path / "logits"))
    config = mixing(experiment, tmp_path, stores["attention"], stores["vision"], logits)
    train_student(config, tmp_path / "run")
    first, before = finished_identity(tmp_path / "run" / "finished.json"), snapshot(tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    shutil.rmtree(logits)
    part_of_store(of_other_teacher, logits, ["logits"])
    with pytest.raises(
        PipelineError, match=r"stores\[2\]\.teacher: [0-9a-f]{12} -> [0-9a-f]{12}; give another"
    ):
        train_student(config, tmp_path / "run")
    train_student(config, tmp_path / "run", overwrite=True)
    assert finished_identity(tmp_path / "run" / "finished.json") != first


def test_a_sweeps_identity_knows_every_store_what_it_gives_and_the_policy(
    experiment, stores, of_other_teacher, tmp_path
):
    attention, vision, logits = stores.values()
    other = part_of_store(of_other_teacher, tmp_path / "other", ["logits"])
    configs = [
        mixing(experiment, tmp_path, attention, vision, logits),
        mixing(experiment, tmp_path, attention, vision, logits, more=["on_missing=skip"]),
        mixing(experiment, tmp_path, attention, vision, other),
        mixing(experiment, tmp_path, experiment.store, (of_other_teacher, ["vision"])),
        mixing(experiment, tmp_path, experiment.store, (of_other_teacher, ["logits"])),
        experiment.config(tmp_path),
    ]
    vision_again = [
        mixing(
            experiment,
            tmp_path,
            attention,
            logits,
            more=["targets.vision.source=recompute", f"teacher.model={model}"],
        )
        for model in ("a", "b")
    ]
    configs += vision_again  # of which teacher, its stores alone do not say
    assert len({run_identity(config) for config in configs}) == len(configs)
    assert run_identity(configs[0]) == run_identity(configs[0])
