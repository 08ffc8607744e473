"""A twig's targets through a store: what the teacher computes, recomputed, and where a store lacks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_experiment import copy_of_teacher, rewrite_store, weights

from cache import Store
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.recompute import load_recomputed
from pipeline.distill.join.stores import Source, Stores
from pipeline.errors import ConfigError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.models.teacher_plan import base_digest, plan_teacher, plan_tensors
from pipeline.positions import Counts, last_prompt_positions
from pipeline.targets.logits import LogitsTarget
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.check import check_store

NAMES = ("hidden_states", "final_hidden", "query_attention")
FLOAT32 = [
    "targets={hidden_states: {layer: 2, codec: float32}, final_hidden: {codec: float32}, "
    "query_attention: {layer: 1, heads: each}}",
    "losses={supervised: {}}",
]
BFLOAT16 = ["targets.hidden_states.codec=bfloat16", "targets.final_hidden.codec=bfloat16"]
RECOMPUTED = [f"targets.{name}.source=recompute" for name in NAMES]
LACKED = ["a1", "two", "t1", "apart"]


@pytest.fixture(scope="module")
def stored(experiment, tmp_path_factory):
    """The config of a store that holds the three targets, nothing lost, and no other."""
    folder = tmp_path_factory.mktemp("twig")
    config = experiment.config(folder, *FLOAT32, f"cache.path={folder}/store")
    cache_teacher(config)
    return config


def batches(config, stores=None, size=5):
    """Yield the batches of a store in order: samples of one image, of several, and of none."""
    preparation = load_preparation(config.teacher.model, config.data)
    targets = config.targets.active()
    dataset = JoinedDataset(
        stores or Store(config.one_cache.path), config.data.shards, preparation, targets=targets
    )
    samples = [dataset[number] for number in range(len(dataset))]
    for start in range(0, len(samples), size):
        yield JoinCollator(targets, IMAGE_TOKEN_ID)(samples[start : start + size])


@torch.no_grad()
def test_a_store_gives_back_what_the_published_model_computes(stored, experiment):
    model = MobileVLMForCausalLM.from_pretrained(experiment.teacher, attn_implementation="eager").eval()
    num_samples = 0
    for batch in batches(stored):
        pixels = torch.cat([image["pixel_values"] for image in batch["images"]])
        named = {name: batch[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**named, pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        # Eager attention and SDPA round differently.
        targets, real = batch["targets"], batch["attention_mask"].bool()
        torch.testing.assert_close(
            targets["hidden_states"][real], outputs.hidden_states[2][real], atol=1e-4, rtol=1e-5
        )
        assert not targets["hidden_states"][~real].any()
        answers = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        torch.testing.assert_close(
            targets["final_hidden"], outputs.hidden_states[-1][answers], atol=1e-4, rtol=1e-5
        )
        rows = last_prompt_positions(batch["labels"], batch["attention_mask"])
        for number, row in enumerate(rows):
            columns = outputs.attentions[1][number, :, row][:, batch["is_vision"][number]]
            mine = targets["query_attention"][number]
            seen = torch.arange(len(batch["is_vision"][number]))[batch["is_vision"][number]] <= row
            wanted = columns * seen / (columns * seen).sum(dim=1, keepdim=True).clamp(min=1e-30)
            torch.testing.assert_close(mine[:, : columns.shape[1]], wanted, atol=1e-6, rtol=1e-4)
            assert not mine[:, columns.shape[1] :].any()
        counts = Counts.of(batch)
        assert torch.equal(batch["received"]["hidden_states"], counts.positions)
        assert torch.equal(batch["received"]["query_attention"], counts.images)
        num_samples += len(rows)
    assert num_samples == 13


def test_recomputed_targets_are_the_stored_ones(stored, experiment, tmp_path):
    config = experiment.config(tmp_path, *FLOAT32, *RECOMPUTED, f"cache.path={stored.one_cache.path}")
    recompute = load_recomputed(config, Store(stored.one_cache.path), device=torch.device("cpu"))
    assert recompute is not None and not recompute.teacher.plan.is_stub
    for batch in batches(stored):
        made = recompute({**batch, "targets": {}}, None)["targets"]
        for name in NAMES:
            torch.testing.assert_close(made[name], batch["targets"][name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", RECOMPUTED[::2])
def test_a_stub_recomputes_hidden_states_and_query_attention(source, stored, experiment, tmp_path):
    config = experiment.config(tmp_path, *FLOAT32, source, f"cache.path={stored.one_cache.path}")
    recompute = load_recomputed(config, Store(stored.one_cache.path), device=torch.device("cpu"))
    assert recompute is not None and recompute.teacher.plan.is_stub
    [name] = recompute.targets
    batch = next(batches(stored))
    made = recompute({**batch, "targets": {}}, None)["targets"]
    torch.testing.assert_close(made[name], batch["targets"][name], atol=1e-5, rtol=1e-5)


def test_what_a_store_lacks_is_filled_and_what_it_holds_stays(stored, experiment, tmp_path):
    def halve(key, arrays):
        return {
            name: [block / 2 for block in a] if isinstance(a, list) else a if a.dtype.kind == "i" else a / 2
            for name, a in arrays.items()
        }

    whole = Store(stored.one_cache.path)
    without = Store(rewrite_store(whole.path, tmp_path / "without", halve, without=LACKED))
    stores = Stores((Source(without, NAMES), Source(whole, ())), "recompute")
    config = experiment.config(tmp_path, *FLOAT32, f"cache.path={without.path}", "on_missing=recompute")
    missing = dict.fromkeys(NAMES, without)
    recompute = load_recomputed(config, without, device=torch.device("cpu"), missing=missing)
    assert recompute is not None
    for batch, exact in zip(batches(config, stores), batches(stored), strict=True):
        lacks = batch["lacking"]["hidden_states"]
        assert lacks.any() and not lacks.all()
        filled, counts = recompute(batch, None), Counts.of(batch)
        for name in NAMES:
            mine, theirs = filled["targets"][name], exact["targets"][name]
            where = lacks.repeat_interleave(counts.answers) if name == "final_hidden" else lacks
            torch.testing.assert_close(mine[where], theirs[where], atol=1e-5, rtol=1e-5)
            assert torch.equal(mine[~where], theirs[~where] / 2)
            assert torch.equal(filled["received"][name], exact["received"][name])


def test_bfloat16_is_within_its_stated_error_and_check_says_so(stored, experiment, tmp_path):
    config = experiment.config(tmp_path, *FLOAT32, *BFLOAT16, f"cache.path={tmp_path}/store")
    cache_teacher(config)
    largest = 0.0
    for mine, exact in zip(batches(config), batches(stored), strict=True):
        for name in NAMES[:2]:
            error = (mine["targets"][name] - exact["targets"][name]).abs()
            assert (error <= exact["targets"][name].abs() * 2.0**-8 + 1e-6).all()
            largest = max(largest, float(error.max()))
    assert largest > 1e-3
    found = check_store(config, num_samples=100, seed=0)
    assert found.is_sound and {array.name for array in found.arrays} == set(NAMES)


def test_check_finds_hidden_states_that_the_teacher_does_not_make(stored, experiment, tmp_path):
    def shifted(key, arrays):
        return arrays | {"hidden_states": np.roll(arrays["hidden_states"], 1, axis=0)}

    store = rewrite_store(stored.one_cache.path, tmp_path / "store", shifted)
    config = experiment.config(tmp_path, *FLOAT32, f"cache.path={store}")
    found = check_store(config, num_samples=100, seed=0)
    assert {array.name for array in found.arrays if array.of_limit > 1} == {"hidden_states"}


def test_a_store_of_hidden_states_names_its_whole_base(experiment, tmp_path):
    """Also where the hidden states are of a stub that reads none of the layers behind."""
    alone = ["targets={hidden_states: {layer: 1}}", "losses={supervised: {}}", f"cache.path={tmp_path}/store"]
    config = experiment.config(tmp_path, *alone)
    cache_teacher(config)
    manifest = Store(config.one_cache.path).manifest
    assert manifest.teacher["is_stub"]
    folder = str(experiment.teacher)
    checkpoint = Checkpoint(folder)
    whole = plan_tensors(checkpoint, read_config(checkpoint.folder), {"logits": LogitsTarget()})
    assert base_digest(manifest.teacher["digests"]) == base_digest(whole.digests)
    changed = copy_of_teacher(experiment, tmp_path / "changed")
    tensors = weights(changed)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    other = plan_teacher(str(changed), targets={"logits": LogitsTarget()})
    assert base_digest(other.digests) != base_digest(whole.digests)


def test_a_part_of_a_base_has_no_digest_of_the_whole(experiment):
    plan = plan_teacher(str(experiment.teacher), targets={})
    with pytest.raises(ConfigError, match="but only vision was hashed; cache the targets again with"):
        base_digest(plan.digests)


def test_the_last_prompt_position_is_before_the_first_answer():
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7], [-100] * 6, [3, -100, -100, 4, -100, -100]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    assert last_prompt_positions(labels, mask).tolist() == [1, 3, 2]
    assert last_prompt_positions(labels[:, :1], mask[:, :1]).tolist() == [0, 0, 0]
