"""The join: by key, in any order, and only of what the teacher saw."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from small_experiment import picture, rewrite_store, shard_members, stored_arrays, write_shard
from torch.utils.data import DataLoader

from cache import SampleEntry, Span, Store
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import read_shard
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset, is_chosen
from pipeline.errors import ConfigError, JoinError, ShardError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.positions import IGNORE_INDEX
from pipeline.teacher_cache.teacher import cache_teacher


@pytest.fixture
def join(experiment, tmp_path):
    """Opens the join of a store, by default the experiment's own, with shards."""

    def build(
        store: Path = experiment.store, shards: Path = experiment.shards, fraction: float = 1.0
    ) -> JoinedDataset:
        config = experiment.config(tmp_path)
        preparation = load_preparation(config.student.model, config.data)
        return JoinedDataset(
            Store(store), str(shards), preparation, targets=config.targets.active(), fraction=fraction
        )

    return build


def read_all(dataset: JoinedDataset) -> list:
    return [dataset[index] for index in range(len(dataset))]


def test_every_sample_joins_its_own_text_images_and_targets_in_any_order(experiment, join):
    dataset, stored = join(), stored_arrays(experiment.store)
    originals = {s.key: s for number in range(3) for s in read_shard(experiment.shard(number))}
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    assert len(order) == len(originals) == 13
    for sample in (dataset[index] for index in order):
        original = originals[sample.key]
        expected = dataset.preparation.tokenize(original.conversations)
        assert sample.tokens == expected
        assert sample.image_digests == original.image_digests
        for digest, data in zip(original.image_digests, original.images, strict=True):
            mine, theirs = sample.pixels[digest], dataset.preparation.preprocess(data)
            assert mine.keys() == theirs.keys() == {"pixel_values"}
            assert torch.equal(mine["pixel_values"], theirs["pixel_values"])
        assert sample.tokens.sizes == (4,) * len(original.images)
        for name in ("attention/layer_0", "attention/layer_1", "vision", "logits/ids"):
            assert np.array_equal(sample.arrays[name], stored[sample.key][name])


def test_a_batch_holds_every_target_beside_its_sample(experiment, join):
    dataset = join()
    samples = [next(s for s in read_all(dataset) if s.key == key) for key in ("two", "t0", "a0", "late")]
    batch = JoinCollator(dataset.targets, IMAGE_TOKEN_ID)(samples)
    assert batch["sizes"] == [(4, 4), (), (4,), (4,)]
    assert batch["is_vision"].sum(dim=1).tolist() == [8, 0, 4, 4]
    assert torch.equal(batch["is_vision"], batch["input_ids"] == IMAGE_TOKEN_ID)
    assert [image["pixel_values"].shape for image in batch["images"]] == [(1, 3, 56, 56)] * 4
    assert batch["image_digests"] == [digest for sample in samples for digest in sample.image_digests]
    assert batch["received"]["vision"].tolist() == [2, 0, 1, 1]
    answers = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(dim=1)
    assert batch["received"]["logits"].tolist() == answers.tolist()
    vision = batch["targets"]["vision"]
    assert vision.shape == (16, 32)
    assert torch.equal(vision[12:].T, torch.from_numpy(samples[3].arrays["vision"][0]))
    attention = batch["targets"]["attention"][0]
    for row, blocks in enumerate(zip(*samples[0].arrays["attention/layer_0"], strict=True)):
        np.testing.assert_array_equal(attention[0, :, row], np.concatenate(blocks, axis=-1))
    assert not attention[1].any() and not attention[2, :, :, 4:].any()


def test_a_batch_of_text_alone_has_no_pixels(join):
    dataset = join()
    samples = [sample for sample in read_all(dataset) if sample.key in ("t0", "t1")]
    batch = JoinCollator(dataset.targets, IMAGE_TOKEN_ID)(samples)
    assert batch["images"] == [] and batch["image_digests"] == [] and batch["sizes"] == [(), ()]
    assert not len(batch["targets"]["vision"]) and not batch["is_vision"].any()
    assert batch["targets"]["attention"][0].shape == (2, 1, 0, 0)


def test_a_forked_worker_joins_the_same(join):
    dataset = join()
    alone = read_all(dataset)
    # Forked after the store was read here: nothing that is open may cross into the worker.
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=120)
    for mine, theirs in zip(alone, loader, strict=True):
        assert mine.key == theirs.key and mine.tokens == theirs.tokens
        assert np.array_equal(mine.arrays["attention/layer_0"], theirs.arrays["attention/layer_0"])
        for digest in mine.image_digests:
            assert torch.equal(mine.pixels[digest]["pixel_values"], theirs.pixels[digest]["pixel_values"])


def test_a_pickled_join_reads_on(join):
    dataset = join()
    assert pickle.loads(pickle.dumps(dataset))[3].key == dataset[3].key


# What changed after it was cached


def changed_shards(experiment, folder: Path, name: str, change) -> Path:
    """A copy of the shards in which the bytes of one member are others, as many."""
    shutil.copytree(experiment.shards, folder)
    for shard in folder.glob("*.tar"):
        members = []
        for member, data in shard_members(shard):
            changed = change(data) if member == name else data
            assert len(changed) == len(data)
            members.append((member, changed))
        whole = shard.stat().st_size
        write_shard(shard, members)
        assert shard.stat().st_size == whole
    return folder


def test_another_text_in_the_shard_is_refused(experiment, join, tmp_path):
    shards = changed_shards(
        experiment, tmp_path / "s", "b0.json", lambda data: data.replace(b"Is it red?", b"Is it new?")
    )
    with pytest.raises(
        JoinError,
        match=r"sample 'b0' of .*\.tar: its token ids are not those that the teacher saw \(.*store \d+, mine \d+\); "
        r"the shard changed after it was cached: restore it",
    ):
        read_all(join(shards=shards))


def test_other_labels_of_the_same_text_are_refused(experiment, join, tmp_path):
    def untrain_last(key, arrays):
        if key == "late":
            arrays["labels"] = arrays["labels"].copy()
            arrays["labels"][-1] = IGNORE_INDEX
        return arrays

    store = rewrite_store(experiment.store, tmp_path / "store", untrain_last)
    with pytest.raises(
        JoinError, match=r"sample 'late' of .*: its labels are not those .*store -100, mine 2"
    ):
        read_all(join(store=store))


def test_a_longer_text_than_the_teacher_saw_is_refused(experiment, join, tmp_path):
    def shorten(key, arrays):
        return {n: a[:-1] if n in ("input_ids", "labels") and key == "a0" else a for n, a in arrays.items()}

    store = rewrite_store(experiment.store, tmp_path / "store", shorten)
    with pytest.raises(JoinError, match=r"sample 'a0' .*token ids .*\(store has (\d+), mine \d+\)"):
        read_all(join(store=store))


def test_another_image_in_the_shard_is_refused(experiment, join, tmp_path):
    shards = changed_shards(
        experiment, tmp_path / "s", "rare.png", lambda data: data[:-20] + b"\0" + data[-19:]
    )
    with pytest.raises(
        JoinError,
        match=r"sample 'rare' of .*: image 'rare.png' has digest \w{16}, the teacher saw \w{16}; the shard changed",
    ):
        read_all(join(shards=shards))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"x" * len(data), "broken JSON: .*"),
        (lambda data: b"{}" + b" " * (len(data) - 2), "no conversations: .*"),
    ],
)
def test_a_text_that_is_none_any_more_is_refused(change, reason, experiment, join, tmp_path):
    shards = changed_shards(experiment, tmp_path / "s", "t1.json", change)
    with pytest.raises(JoinError, match=rf"sample 't1' of .*'t1.json' holds no usable text \({reason}\)"):
        read_all(join(shards=shards))


def test_a_shard_cut_short_is_refused(experiment, join, tmp_path):
    shutil.copytree(experiment.shards, tmp_path / "s")
    dataset = join(shards=tmp_path / "s")
    shard = tmp_path / "s" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(ShardError, match=r"shard-000002.tar: .* the shard has changed since it was read"):
        read_all(dataset)
    with pytest.raises(JoinError, match=r"1 of 3 shards changed since .*shard-000002.tar \(.* 1,500 now\)"):
        join(shards=tmp_path / "s")


def test_a_shard_without_its_part_says_what_to_run(experiment, join, tmp_path):
    shutil.copytree(experiment.shards, tmp_path / "s")
    shutil.copy(experiment.shard(0), tmp_path / "s" / "shard-000009.tar")
    with pytest.raises(
        ConfigError,
        match=r"no finished part for 1 of 4 shards, first 'shard-000009'; run `alignkd teacher-cache`",
    ):
        join(shards=tmp_path / "s")


def test_a_store_without_one_sample_of_the_shards_is_refused(experiment, join, tmp_path):
    write_shard(tmp_path / "s" / "none.tar", [("a.png", picture(0))])
    overrides = [f"data.shards={tmp_path}/s", f"cache.path={tmp_path}/store"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    with pytest.raises(ConfigError, match=r"holds no sample of data.shards; see its rejects"):
        join(store=tmp_path / "store", shards=tmp_path / "s")


def test_a_fraction_takes_whole_images_and_is_part_of_every_larger_one(join):
    everything = {entry.key: entry.images[:1] for _, entry in join().rows}
    smaller: set[str] = set()
    for fraction in (0.2, 0.4, 0.6, 0.8, 1.0):
        taken = {entry.key for _, entry in join(fraction=fraction).rows}
        assert smaller <= taken
        images = {everything[key] for key in taken if everything[key]}
        assert taken >= {key for key, image in everything.items() if image in images}
        smaller = taken
    assert smaller == set(everything)
    assert 0 < len(join(fraction=0.4)) < len(everything)


@pytest.mark.slow
def test_a_fraction_takes_about_that_share():
    span = Span("file", 0, 1)
    digests = [blake3(str(number).encode()).hexdigest() for number in range(20_000)]
    entries = [SampleEntry(digest, (digest,), (span,), span) for digest in digests]
    texts = [SampleEntry(digest, (), (), span) for digest in digests]
    for some in (entries, texts):
        # Four standard deviations of a fair draw of 20,000.
        assert sum(is_chosen(e, 0.1) for e in some) / 20_000 == pytest.approx(0.1, abs=0.009)


def test_a_fraction_without_a_sample_is_refused(join):
    with pytest.raises(ConfigError, match=r"no sample of data\.shards within data\.fraction 1e-06: raise it"):
        join(fraction=1e-6)
