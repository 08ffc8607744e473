"""`on_missing`: what becomes of a sample that a store lacks which has to give a target of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_experiment import rewrite_store
from small_mixture import another_teacher, losses_of, mixing, part_of_store

from cache import FingerprintMismatch, Store
from pipeline.config.config import labels_only
from pipeline.config.provenance import finished_identity
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.stores import open_stores
from pipeline.distill.parts import needed_targets
from pipeline.distill.student import build_trainer, train_student
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.errors import ConfigError, JoinError, PipelineError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.teacher_cache.teacher import cache_teacher

LACKED = ["a1", "two", "t1", "apart"]
STEPS = ["train.max_steps=4", "train.dataloader_num_workers=0"]
SKIP, RECOMPUTE = ["on_missing=skip"], ["on_missing=recompute"]


@pytest.fixture(scope="module")
def stores(experiment, tmp_path_factory):
    """Attention, vision and logits apart; `NAME without` lacks four samples, `NAME cut` the last shard's."""
    folder = tmp_path_factory.mktemp("stores")
    made = {}
    for name in ("attention", "vision", "logits"):
        made[name] = part_of_store(experiment.store, folder / name, [name])
        made[f"{name} without"] = rewrite_store(made[name], folder / f"{name}_without", without=LACKED)
        parts = ["shard-000000", "shard-000001"]
        made[f"{name} cut"] = part_of_store(experiment.store, folder / f"{name}_cut", [name], parts)
    return made


@pytest.fixture
def mixed(experiment, stores, tmp_path):
    """A config of the stores of these names."""
    return lambda *names, more=(): mixing(
        experiment,
        tmp_path,
        *(stores[name] if isinstance(name, str) else name for name in names),
        more=more,
    )


def opened(config) -> JoinedDataset:
    preparation = load_preparation(config.student.model, config.data)
    stores = open_stores(config, preparation)
    data = config.data
    return JoinedDataset(
        stores, data.shards, preparation, targets=needed_targets(config), fraction=data.fraction
    )


@pytest.fixture(scope="module")
def everything(experiment):
    """Every key, in the shards' order."""
    return list(Store(experiment.store).keys())


def last_shard(experiment) -> list[str]:
    return [entry.key for entry in Store(experiment.store).entries("shard-000002")]


def keys(dataset: JoinedDataset) -> list[str]:
    return [entry.key for _, entry in dataset.rows]


# raise


def test_a_sample_that_a_store_rejected_is_an_error_with_its_reason(mixed, stores, everything, tmp_path):
    config = mixed("attention without", "vision", "logits")
    first = next(key for key in everything if key in LACKED)
    with pytest.raises(
        JoinError,
        match=rf"sample '{first}' is not in {stores['attention without']} \(rejected there: left out by a test\), "
        r"which gives attention, but in another store; 4 of 13 samples are missing there: cache them with `alignkd "
        r"teacher-cache`, or set on_missing: skip or recompute",
    ):
        train_student(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_part_that_one_store_has_not_finished_is_an_error(mixed, experiment):
    with pytest.raises(
        JoinError,
        match=rf"sample '{last_shard(experiment)[0]}' is not in .*logits_cut \(its part shard-000002 is not finished "
        r"there\), which gives logits, .*; 3 of 13 samples are missing there: .* set on_missing: skip$",
    ):
        opened(mixed("attention", "vision", "logits cut"))


def test_a_key_that_a_store_does_not_know_is_an_error(experiment, mixed, tmp_path):
    """One of a shard that was packed again since."""
    from small_experiment import shard_members, write_shard

    for number in range(3):
        members = shard_members(experiment.shard(number))
        renamed = [(name.replace("b0.", "b9."), data) for name, data in members]
        shard = write_shard(tmp_path / "shards" / experiment.shard(number).name, renamed)
        shutil.copystat(experiment.shard(number), shard)  # else the shard alone would tell
    shards = f"data.shards={tmp_path}/shards"
    cache_teacher(experiment.config(tmp_path, shards, f"cache.path={tmp_path}/again"))
    config = mixed("attention", (tmp_path / "again", ["vision", "logits"]), more=[shards])
    with pytest.raises(
        JoinError, match=r"sample 'b9' is not in .*attention \(part shard-000000 knows no such key\)"
    ):
        opened(config)


def test_a_shard_that_no_store_has_is_an_error_of_all(mixed):
    with pytest.raises(
        ConfigError,
        match=r"each of .*attention_cut and .*logits_cut has no finished part for 1 of 3 shards, "
        r"first 'shard-000002'; run `alignkd teacher-cache` with the config of one of them, or set on_missing: skip",
    ):
        opened(mixed("attention cut", "vision cut", "logits cut"))


def test_what_every_store_rejected_is_missing_in_none(mixed, everything):
    dataset = opened(mixed("attention without", "vision without", "logits without"))
    assert keys(dataset) == [key for key in everything if key not in LACKED] and dataset.missing == ()


# skip


def test_skipped_samples_are_left_out_counted_and_recorded(
    mixed, stores, experiment, everything, tmp_path, capsys
):
    last = last_shard(experiment)
    first = next(key for key in everything if key in LACKED)
    config = mixed("attention without", "vision", "logits cut", more=SKIP)
    train_student(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("on_missing")]
    assert told == [
        f"on_missing: skip: 4 of 13 samples are not in {stores['attention without']} (attention), first '{first}'",
        f"on_missing: skip: 3 of 13 samples are not in {stores['logits cut']} (logits), first '{last[0]}'",
    ]
    made = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert [(m["store"], m["count"], m["of"], m["first"]) for m in made["missing"]] == [
        (str(stores["attention without"]), 4, 13, first),
        (str(stores["logits cut"]), 3, 13, last[0]),
    ]
    assert keys(opened(config)) == [key for key in everything if key not in LACKED and key not in last]


def test_the_order_of_samples_is_the_shards_whatever_the_order_of_the_stores(mixed, everything):
    """So that runs which differ in stores see the same data in the same order."""
    names = ("attention without", "vision", "logits")
    for order in (names, names[::-1]):
        assert keys(opened(mixed(*order, more=RECOMPUTE))) == everything


def test_labels_alone_skip_what_the_distilled_student_skips(mixed):
    """Else the two would not be of the same data."""
    config = mixed("attention without", "vision", "logits cut", more=SKIP)
    assert keys(opened(labels_only(config))) == keys(opened(config))


def test_a_fraction_counts_what_it_chooses(mixed):
    dataset = opened(mixed("attention without", "vision", "logits", more=[*SKIP, "data.fraction=0.8"]))
    whole = opened(mixed("attention", "vision", "logits", more=["data.fraction=0.8"]))
    assert keys(dataset) == [key for key in keys(whole) if key not in LACKED]
    (missing,) = dataset.missing
    assert (missing.count, missing.of) == (len(set(keys(whole)) & set(LACKED)), len(whole))
    assert 0 < missing.count < 4


def test_stores_without_one_sample_in_common_are_refused(stores, mixed, everything, tmp_path):
    others = [key for key in everything if key not in LACKED]
    rest = rewrite_store(stores["logits"], tmp_path / "rest", without=others)
    with pytest.raises(ConfigError, match=r"hold no sample in common of data.shards; see its rejects"):
        opened(mixed("attention without", "vision", rest, more=SKIP))


def test_one_store_skips_the_shards_that_it_has_no_part_of(experiment, tmp_path, capsys):
    names = ["attention", "vision", "logits"]
    cut = part_of_store(experiment.store, tmp_path / "cut", names, ["shard-000000", "shard-000002"])
    config = experiment.config(tmp_path, f"cache.path={cut}", *SKIP)
    train_student(config, tmp_path / "run")
    line = f"on_missing: skip: 1 of 3 shards are not in {cut} (attention and vision and logits), first 'shard-000001'"
    assert line in capsys.readouterr().err.splitlines()
    (missing,) = json.loads((tmp_path / "run" / "provenance.json").read_text())["missing"]
    assert (missing["what"], missing["count"], missing["first"]) == ("shards", 1, "shard-000001")
    for policy in ([], RECOMPUTE):
        with pytest.raises(ConfigError, match=r"cut has no finished part for 1 of 3 shards"):
            opened(experiment.config(tmp_path, f"cache.path={cut}", *policy))


def test_one_store_is_no_policys_business_otherwise(experiment, tmp_path):
    one = losses_of(experiment.config(tmp_path), tmp_path / "raise")
    for policy in (SKIP, RECOMPUTE):
        assert losses_of(experiment.config(tmp_path, *policy), tmp_path / policy[0]) == one


# recompute


def test_recomputed_samples_have_the_losses_of_a_whole_store(mixed, experiment, stores, tmp_path, capsys):
    whole = losses_of(experiment.config(tmp_path, *STEPS), tmp_path / "whole")
    config = mixed("attention without", "vision cut", "logits", more=[*STEPS, *RECOMPUTE])
    again = losses_of(config, tmp_path / "again")
    assert len(again) == 4
    for mine, theirs in zip(again, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("on_missing")]
    assert [line.rpartition(", first ")[0] for line in told] == [
        f"on_missing: recompute: 4 of 13 samples are not in {stores['attention without']} (attention)",
        f"on_missing: recompute: 3 of 13 samples are not in {stores['vision cut']} (vision)",
    ]


def test_recomputing_beside_a_target_that_no_store_holds(mixed, experiment, tmp_path):
    whole = losses_of(experiment.config(tmp_path, *STEPS), tmp_path / "whole")
    source = ["targets.vision.source=recompute"]
    config = mixed("attention without", "logits", more=[*STEPS, *RECOMPUTE, *source])
    for mine, theirs in zip(losses_of(config, tmp_path / "again"), whole, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize(
    "batch_of", [["a0", "a1", "t0", "two", "late"], ["t1", "t0"], ["apart"], ["a0", "b0"]]
)
@pytest.mark.parametrize("lacking", [("attention",), ("vision",), ("attention", "vision")], ids=",".join)
def test_only_what_a_store_lacks_is_made_again(batch_of, lacking, mixed, experiment, stores, tmp_path):
    """What is stored stays, to the bit, even where it is not what the teacher says."""

    def halve(key, arrays):
        return {
            name: [block / 2 for block in a] if name.startswith("attention") else a
            for name, a in arrays.items()
        }

    halved = rewrite_store(stores["attention"], tmp_path / "halved", halve, without=LACKED)
    names = [
        halved if "attention" in lacking else "attention",
        "vision without" if "vision" in lacking else "vision",
        "logits",
    ]
    dataset = opened(mixed(*names, more=RECOMPUTE))
    samples = {sample.key: sample for sample in (dataset[index] for index in range(len(dataset)))}
    batch = JoinCollator(dataset.targets, IMAGE_TOKEN_ID)([samples[key] for key in batch_of])
    config = mixed(*names, more=RECOMPUTE)
    trainer = build_trainer(
        config, tmp_path / "run", dataset, identity=RunIdentity("of a test", {}, samples_per_step=4)
    )
    distiller = trainer.distiller
    patch_features = distiller.patch_features(batch)
    assert distiller.recompute is not None
    filled = distiller.recompute(batch, patch_features)

    whole = opened(mixed("attention", "vision", "logits"))
    exact = {sample.key: sample for sample in (whole[index] for index in range(len(whole)))}
    expected = JoinCollator(whole.targets, IMAGE_TOKEN_ID)([exact[key] for key in batch_of])
    for row, key in enumerate(batch_of):
        for layer in (0, 1):
            mine, stored = (
                filled["targets"]["attention"][layer][row],
                batch["targets"]["attention"][layer][row],
            )
            if "attention" in lacking and key in LACKED:
                torch.testing.assert_close(
                    mine, expected["targets"]["attention"][layer][row], atol=1e-5, rtol=1e-4
                )
            else:
                assert torch.equal(mine, stored)
    sizes = [sum(samples[key].tokens.sizes) for key in batch_of]
    of_samples = (part["targets"]["vision"].split(sizes) for part in (filled, expected))
    for key, mine, theirs in zip(batch_of, *of_samples, strict=True):
        if "vision" in lacking and key in LACKED:
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(mine, theirs)
    for name, received in expected["received"].items():
        assert torch.equal(filled["received"][name], received)


def test_a_batch_says_which_rows_it_lacks(mixed):
    dataset = opened(mixed("attention without", "vision", "logits", more=RECOMPUTE))
    samples = {sample.key: sample for sample in (dataset[index] for index in range(len(dataset)))}
    batch = JoinCollator(dataset.targets, IMAGE_TOKEN_ID)([samples[key] for key in ("a0", "a1", "t1", "two")])
    # A text alone has no rows of attention: nothing is lacking.
    assert {name: lacks.tolist() for name, lacks in batch["lacking"].items()} == {
        "attention": [False, True, False, True]
    }
    assert batch["received"]["attention"].tolist()[1:] == [0, 0, 0] and batch["received"]["attention"][0] > 0
    first, second = samples["two"].arrays["attention/layer_0"]
    assert first.shape == second.shape and not first.any() and not second.any()


def test_a_batch_that_lacks_rows_does_not_pass_as_whole(mixed, tmp_path):
    config = mixed("attention without", "vision", "logits", more=RECOMPUTE)
    dataset = opened(config)
    samples = {sample.key: sample for sample in (dataset[index] for index in range(len(dataset)))}
    batch = JoinCollator(dataset.targets, IMAGE_TOKEN_ID)([samples[key] for key in ("a0", "a1")])
    distiller = build_trainer(
        config, tmp_path / "run", dataset, identity=RunIdentity("of a test", {}, samples_per_step=4)
    ).distiller
    distiller.recompute = None
    with pytest.raises(JoinError, match=r"^sample 1 of the batch .* received 0"):
        distiller(batch)


def test_logits_cannot_be_recomputed(mixed):
    with pytest.raises(
        ConfigError,
        match=r"on_missing: recompute cannot give 'logits', which needs the whole teacher; sample '\w+' is not "
        r"in .*logits_without \(rejected there: .*\), nor are 3 others: cache them .*, or set on_missing: skip",
    ):
        opened(mixed("attention", "vision", "logits without", more=RECOMPUTE))


def test_the_stub_is_of_the_teacher_whose_store_lacks_the_sample(
    mixed, experiment, stores, tiny_model, tmp_path
):
    teacher = another_teacher(experiment, tmp_path / "teacher", tiny_model)
    overrides = [f"teacher.model={teacher}", f"cache.path={tmp_path}/other"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    other = part_of_store(tmp_path / "other", tmp_path / "vision", ["vision"])
    lacks = rewrite_store(other, tmp_path / "lacks", without=LACKED)
    config = mixed("attention", lacks, "logits", more=[*RECOMPUTE, *STEPS])
    with pytest.raises(FingerprintMismatch, match=r"lacks holds something else.*teacher: vision: .* -> "):
        train_student(config, tmp_path / "run")
    again = mixed("attention", lacks, "logits", more=[*RECOMPUTE, *STEPS, f"teacher.model={teacher}"])
    whole = losses_of(mixed("attention", other, "logits", more=STEPS), tmp_path / "whole")
    for mine, theirs in zip(losses_of(again, tmp_path / "again"), whole, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-6)


def test_a_target_that_no_store_holds_is_of_the_teacher_of_any(
    mixed, experiment, stores, tiny_model, tmp_path
):
    """Its width is that teacher's, not the first store's."""
    teacher = another_teacher(experiment, tmp_path / "teacher", tiny_model)
    overrides = [f"teacher.model={teacher}", f"cache.path={tmp_path}/other"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    logits = part_of_store(tmp_path / "other", tmp_path / "logits", ["logits"])
    whole = losses_of(mixed("attention", (tmp_path / "other", ["vision", "logits"])), tmp_path / "whole")
    source = ["targets.vision.source=recompute", f"teacher.model={teacher}"]
    again = losses_of(mixed("attention", logits, more=source), tmp_path / "again")
    assert again[0] == pytest.approx(whole[0], rel=2e-4, abs=1e-6)
    with pytest.raises(FingerprintMismatch, match="teacher: vision"):
        train_student(mixed("attention", "logits", more=source), tmp_path / "none")


def test_stores_of_two_dtypes_are_not_completed_by_one_stub(mixed, experiment, stores, tmp_path):
    overrides = ["teacher.dtype=bfloat16", f"cache.path={tmp_path}/half"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    half = part_of_store(tmp_path / "half", tmp_path / "vision", ["vision"])
    lacks = rewrite_store(half, tmp_path / "lacks", without=LACKED)
    with pytest.raises(
        ConfigError, match=r"recomputed as in .* \(\w+\) and in .* \(\w+\), but a stub computes in one dtype"
    ):
        train_student(mixed("attention without", lacks, "logits", more=RECOMPUTE), tmp_path / "run")


def test_a_run_is_done_again_when_a_store_has_more(mixed, stores, tmp_path):
    """Under `recompute` the number of samples is the same, but stored values are not made ones."""
    attention = Path(shutil.copytree(stores["attention without"], tmp_path / "attention"))
    config = mixed(attention, "vision", "logits", more=RECOMPUTE)
    train_student(config, tmp_path / "run")
    first = finished_identity(tmp_path / "run" / "finished.json")
    shutil.rmtree(attention)
    shutil.copytree(stores["attention"], attention)
    with pytest.raises(PipelineError, match=r"missing: \[\d+\] -> \[\], samples\.contents: "):
        train_student(config, tmp_path / "run")
    train_student(config, tmp_path / "run", overwrite=True)
    assert finished_identity(tmp_path / "run" / "finished.json") != first
