"""The Distiller: terms, counts known in advance, rows of targets, and nothing to learn from oneself."""

from __future__ import annotations

import pytest
import torch
from small_experiment import STUDENT_LOSSES, stored_arrays
from torch import nn
from watched import results_of

from cache import Store
from pipeline.data.load_preparation import load_preparation
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.model.distiller import Distiller, build_heads
from pipeline.distill.training.trainer import count_terms
from pipeline.errors import JoinError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.models.mobilevlm.vision import VisionTower
from pipeline.models.vlm import VisionLanguageModel
from pipeline.shapes import ShapeError
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS
from pipeline.teacher_cache.teacher import cache_teacher

BATCHES = {
    "ragged": ["two", "t0", "a0", "late", "apart"],
    "text alone": ["t0", "t1"],
    "one image each": ["b0", "a2"],
    "one sample": ["apart"],
}


@pytest.fixture(scope="module")
def config(experiment):
    return experiment.config(experiment.file.parent)


@pytest.fixture(scope="module")
def joined(config):
    """Makes a batch of the samples of given keys."""
    preparation = load_preparation(config.student.model, config.data)
    store = Store(config.one_cache.path)
    dataset = JoinedDataset(store, config.data.shards, preparation, targets=config.targets.active())
    samples = {sample.key: sample for sample in (dataset[index] for index in range(len(dataset)))}
    return lambda keys: JoinCollator(dataset.targets, IMAGE_TOKEN_ID)([samples[key] for key in keys])


@pytest.fixture
def distiller(config):
    return make_distiller(config, config.student.model)


def facts_of(config) -> dict[str, TeacherFacts]:
    return dict.fromkeys(TARGETS, TeacherFacts.of(Store(config.one_cache.path).manifest))


def make_distiller(config, model: str, **options) -> Distiller:
    student = MobileVLMForCausalLM.from_pretrained(model, dtype=torch.float32)
    facts = facts_of(config)
    return Distiller(student, config.losses.active(), facts=facts, **options)


@pytest.mark.parametrize("keys", BATCHES.values(), ids=BATCHES)
def test_counts_known_before_the_forward_are_those_that_the_losses_return(keys, joined, distiller, config):
    batch = joined(keys)
    result = distiller(batch)
    assert list(result) == STUDENT_LOSSES
    counts = [int(count) for _, count in result.values()]
    assert count_terms(batch, config.losses.active()) == counts
    assert all(bool(torch.isfinite(total)) for total, _ in result.values())


def test_a_batch_is_the_sum_of_its_samples(joined, distiller):
    keys = BATCHES["ragged"]
    together = distiller(joined(keys))
    alone = [distiller(joined([key])) for key in keys]
    for name, (total, count) in together.items():
        assert float(count) == sum(float(terms[name][1]) for terms in alone)
        expected = sum(terms[name][0].item() for terms in alone)
        assert total.item() == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def test_a_student_that_is_the_teacher_has_nothing_to_learn(config, joined):
    same = make_distiller(config, config.teacher.model)
    batch = joined(BATCHES["ragged"])
    # Unmixed: an even mixture of heads is no single head.
    same.losses["attention"] = same.losses["attention"].model_copy(update={"heads": "mean"})
    terms = same(batch)
    for name in ("attention", "vision_all", "vision_focus"):
        assert terms[name][0].item() == pytest.approx(0, abs=1e-6), name
    # float16 log probabilities: an error of 2^-11 of each, squared in the divergence.
    assert 0 <= float(terms["logits"][0] / terms["logits"][1]) < 1e-4
    assert float(terms["supervised"][0]) > 0


def test_under_lossy_codecs_the_same_student_is_within_their_stated_errors(config, experiment, tmp_path):
    overrides = ["targets.attention.codec=sqrt_uint8", "targets.vision={}", "losses.attention={}"]
    lossy = experiment.config(tmp_path, *overrides, f"cache.path={tmp_path}/store")
    cache_teacher(lossy)
    exact = stored_arrays(experiment.store)
    step = lossy.targets.vision.step
    for key, arrays in stored_arrays(tmp_path / "store").items():
        for image, expected in zip(arrays["vision"], exact[key]["vision"], strict=True):
            assert abs(image - expected).max() <= step / 2 + 1e-6
    preparation = load_preparation(lossy.student.model, lossy.data)
    targets = lossy.targets.active()
    dataset = JoinedDataset(Store(lossy.one_cache.path), lossy.data.shards, preparation, targets=targets)
    batch = JoinCollator(targets, IMAGE_TOKEN_ID)([dataset[index] for index in range(5)])
    terms = make_distiller(lossy, lossy.teacher.model)(batch)
    for name in ("vision_all", "vision_focus"):
        assert float(terms[name][0] / terms[name][1]) <= (step / 2) ** 2
    assert float(terms["attention"][0] / terms["attention"][1]) < 1e-4


def test_patch_features_from_memory_give_the_same_terms(config, joined):
    remembering = make_distiller(config, config.student.model, patch_feature_cache_bytes=2**20)
    forgetting = make_distiller(config, config.student.model)
    forgetting.load_state_dict(remembering.state_dict())
    for keys in (["a0", "two"], ["apart", "a0"], ["two", "late", "a1"]):
        mine, theirs = remembering(joined(keys)), forgetting(joined(keys))
        for name in mine:
            assert float(mine[name][0]) == pytest.approx(float(theirs[name][0]), rel=1e-5), name
    assert len(remembering.patch_feature_cache) == 5 and not forgetting.patch_feature_cache
    with results_of(VisionTower) as computed:
        remembering(joined(["a0", "late"]))
    assert not computed


def test_features_of_a_tower_in_memory_carry_no_gradient_but_the_projector_has_one(config, joined):
    remembering = make_distiller(config, config.student.model, patch_feature_cache_bytes=2**20)
    for _ in range(2):
        remembering.zero_grad()
        remembering(joined(["a0"]))["vision_all"][0].backward()
        assert remembering.student.model.mm_projector.mlp.mlp[0].weight.grad.any()


# Rows of targets


@pytest.mark.parametrize(
    ("target", "sample", "expected"),
    [
        ("attention", 1, "needs .* rows of the target 'attention' and received 3"),
        ("vision", 0, "needs 2 rows of the target 'vision' and received 3"),
        ("logits", 2, "needs .* rows of the target 'logits' and received 3"),
    ],
)
def test_a_sample_without_all_rows_of_a_target_stops_the_run(target, sample, expected, joined, distiller):
    batch = joined(["two", "b0", "a1"])
    batch["received"][target][sample] = 3
    with pytest.raises(JoinError, match=rf"sample {sample} of the batch {expected}"):
        distiller(batch)


def test_attention_of_other_columns_is_refused_at_the_border(joined, distiller):
    batch = joined(["two", "b0"])
    attention = batch["targets"]["attention"]
    attention[0] = attention[0][..., :-1]
    with pytest.raises(
        ShapeError, match=r"stored attention of layer 0: expected axes 'B H T J' with T=\d+, J=8"
    ):
        distiller(batch)


# Heads


def test_the_vision_losses_share_one_map_and_mixing_has_a_head_for_each_pair_of_layers(distiller):
    assert sorted(distiller.heads) == ["head_mixer", "vision_map"]
    assert distiller.heads["vision_map"].weight.shape == (24, 32)
    assert distiller.heads["head_mixer"].scores.shape == (2, 4, 4)
    assert not any("heads" in name for name in distiller.student.state_dict())


def test_only_losses_that_read_a_head_make_one(config):
    student = VisionLanguageModel(MobileVLMForCausalLM.from_pretrained(config.student.model))
    facts, losses = facts_of(config), config.losses.active()
    made = {name: sorted(build_heads({name: losses[name]}, student, facts)) for name in losses}
    assert made == {
        "supervised": [],
        "attention": ["head_mixer"],
        "vision_all": ["vision_map"],
        "vision_focus": ["vision_map"],
        "logits": [],
    }
    unmixed = {"attention": losses["attention"].model_copy(update={"heads": "mean"})}
    assert len(build_heads(unmixed, student, facts)) == 0


def test_every_head_and_every_trained_part_of_the_student_gets_a_gradient(joined, distiller):
    terms = distiller(joined(BATCHES["ragged"]))
    sum(total for total, _ in terms.values()).backward()
    without = [n for n, p in distiller.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = [n for n, p in distiller.named_parameters() if not p.requires_grad]
    assert all(name.startswith("student.model.vision_tower.") for name in frozen) and frozen
    assert isinstance(distiller.heads, nn.ModuleDict)


def test_heads_and_losses_are_float32_where_the_student_computes_in_bfloat16(joined, distiller):
    mapped = []
    distiller.heads["vision_map"].register_forward_hook(
        lambda module, given, result: mapped.append(result.dtype)
    )
    exact = distiller(joined(BATCHES["ragged"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distiller(joined(BATCHES["ragged"]))
    assert set(mapped) == {torch.float32}
    for name, (total, _) in terms.items():
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, exact[name][0], rtol=0.02, atol=0)


def test_a_student_in_bfloat16_has_heads_and_losses_in_float32(config, joined):
    student = MobileVLMForCausalLM.from_pretrained(config.student.model, dtype=torch.bfloat16)
    distiller = Distiller(student, config.losses.active(), facts=facts_of(config))
    terms = distiller(joined(BATCHES["ragged"]))
    sum(total for total, _ in terms.values()).backward()
    assert {total.dtype for total, _ in terms.values()} == {torch.float32}
    assert {p.dtype for p in distiller.heads.parameters()} == {torch.float32}
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters() if p.requires_grad
    )
