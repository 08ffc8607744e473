"""Decoding with a twig against an oracle that computes everything again for every token, of every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from twig_models import (
    FAMILIES,
    TwigSpecimen,
    assert_pairs_follow_the_base,
    kept_by,
    oracle,
    twig_specimen,
)

from pipeline.errors import ConfigError
from pipeline.twig.decoding.choosing import Sampling
from pipeline.twig.decoding.generate import Decoding, answer
from pipeline.twig.decoding.session import Session
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(attach_layer=1, num_layers=2, wipe_layer=5, num_base_layers=6)
KEEP = 0.5
WAYS: tuple[dict[str, Any], ...] = (
    {"delta": 0},
    {"delta": 1},
    {"delta": 5, "threshold": 0.0},
    {"delta": 3, "threshold": 0.6},
    {"delta": "auto", "threshold": 0.3, "look_up": 1},
)


@pytest.fixture(scope="module", params=FAMILIES)
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    return twig_specimen(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def mobilevlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwigSpecimen]:
    yield twig_specimen("mobilevlm", tmp_path_factory.mktemp("one") / "base")


@pytest.mark.parametrize("seed", [None, 1], ids=["copied", "random"])
def test_the_text_is_that_of_the_base_without_drafts(specimen, seed):
    """One prompt at a time, several images, a late image, text alone; pruned and not; any way to draft."""
    twig, stops = specimen.twig(GEOMETRY, seed=seed), specimen.stop_ids
    for number in range(specimen.num_prompts):
        prompts = specimen.prompts([number])
        for keep in (None, KEEP):
            kept = None if keep is None else kept_by(specimen, twig, prompts, keep)
            expected = oracle(specimen.base, prompts, kept, GEOMETRY, max_new_tokens=8, stop_ids=stops)
            for way in WAYS:
                made = answer(specimen.base, twig, prompts, Decoding(8, stops, keep, **way))
                assert made.tokens == [expected], (number, keep, way)


def test_a_batch_of_ragged_prompts_is_answered_as_each_alone(specimen):
    twig, stops = specimen.twig(GEOMETRY), specimen.stop_ids
    numbers = list(range(specimen.num_prompts))
    for keep in (None, KEEP):
        plain = Decoding(8, stops, keep, delta=0)
        alone = [answer(specimen.base, twig, specimen.prompts([n]), plain).tokens[0] for n in numbers]
        for way in WAYS:
            made = answer(specimen.base, twig, specimen.prompts(numbers), Decoding(8, stops, keep, **way))
            assert made.tokens == alone, (keep, way)


@torch.inference_mode()
def test_decoding_reads_prompts_as_the_training_does(specimen):
    """Also in Qwen3-VL, whose decoder adds features to the base's first layers, and not to a twig's."""
    twig, prompts = specimen.twig(GEOMETRY), specimen.prompts(list(range(specimen.num_prompts)))
    session = Session(specimen.base, twig, prompts, first=1, wipe=5, room=3)
    states = session.read_prompts()
    newest, _ = session.read_with_twig(states)
    whole = LayerInputs.record(specimen.base.network, prompts.inputs)
    torch.testing.assert_close(newest, twig.run_layers(states, whole)[:, -1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 20])
def test_no_answer_is_longer_than_asked(mobilevlm, most):
    twig = mobilevlm.twig(GEOMETRY)
    for keep in (None, KEEP):
        prompts = mobilevlm.prompts([0])
        kept = None if keep is None else kept_by(mobilevlm, twig, prompts, keep)
        expected = oracle(mobilevlm.base, prompts, kept, GEOMETRY, max_new_tokens=most)
        assert len(expected) == most
        for way in WAYS:
            assert answer(mobilevlm.base, twig, prompts, Decoding(most, keep=keep, **way)).tokens == [
                expected
            ]


def test_an_answer_ends_with_the_first_stop_token_wherever_it_is(mobilevlm):
    """Each token of an answer is the stop token once: first, among accepted drafts, behind them."""
    twig, prompts = mobilevlm.twig(GEOMETRY), mobilevlm.prompts([1])
    whole = oracle(mobilevlm.base, prompts, None, GEOMETRY, max_new_tokens=12)
    for token in whole:
        expected = whole[: whole.index(token) + 1]
        for way in WAYS:
            made = answer(mobilevlm.base, twig, prompts, Decoding(12, frozenset([token]), **way))
            assert made.tokens == [expected]


def test_drafts_of_a_base_that_does_nothing_more_are_all_accepted(mobilevlm):
    """With deep layers that add nothing, and the base's own head, the twig is the base."""
    twig = mobilevlm.twig(GEOMETRY)
    state = {name: value.clone() for name, value in mobilevlm.base.network.state_dict().items()}
    try:
        with torch.no_grad():
            for layer in mobilevlm.base.layers[3:]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        made = answer(mobilevlm.base, twig, mobilevlm.prompts([0]), Decoding(20, delta=4, threshold=0))
        assert made.accepted == made.drafted == [16]
        assert made.passes == [4]  # 20 tokens: 4 drafts and one of the base's own each
    finally:
        mobilevlm.base.network.load_state_dict(state)


def test_drafts_are_accepted_and_rejected_here(mobilevlm):
    """Otherwise the tests of exactness would test less than they say."""
    made = answer(mobilevlm.base, mobilevlm.twig(GEOMETRY), mobilevlm.prompts([0]), Decoding(30, threshold=0))
    assert 0 < made.accepted[0] < made.drafted[0]


def test_keeping_all_tokens_to_the_last_layer_is_no_pruning(mobilevlm):
    whole = Geometry(1, 2, wipe_layer=6, num_base_layers=6)
    twig, prompts = mobilevlm.twig(whole), mobilevlm.prompts([1])
    pruned = answer(mobilevlm.base, twig, prompts, Decoding(10, keep=1.0))
    assert pruned.tokens == answer(mobilevlm.base, twig, prompts, Decoding(10)).tokens
    assert pruned.tokens == answer(mobilevlm.base, None, prompts, Decoding(10, delta=0)).tokens


def test_a_short_head_drafts_its_tokens_alone_and_changes_no_text(mobilevlm):
    twig, prompts = mobilevlm.twig(GEOMETRY), mobilevlm.prompts([0])
    expected = oracle(mobilevlm.base, prompts, None, GEOMETRY, max_new_tokens=12)
    every = torch.arange(mobilevlm.base.vocab_size)
    twig.shorten(every[~torch.isin(every, torch.tensor(expected))])
    none = answer(mobilevlm.base, twig, prompts, Decoding(12, threshold=0))
    assert none.tokens == [expected] and none.accepted == [0] and none.drafted[0] > 0
    twig.shorten(torch.tensor(sorted(set(expected))))
    some = answer(mobilevlm.base, twig, prompts, Decoding(12, threshold=0))
    assert some.tokens == [expected] and some.accepted[0] > 0


def test_look_up_drafts_what_followed_before(mobilevlm):
    """A base that repeats itself: n-gram drafts are accepted where a random twig's are not."""
    prompts = mobilevlm.prompts([0])
    expected = oracle(mobilevlm.base, prompts, None, GEOMETRY, max_new_tokens=30)
    twig = mobilevlm.twig(GEOMETRY, seed=3)
    plain, looked = (
        answer(mobilevlm.base, twig, prompts, Decoding(30, threshold=1.1, look_up=n)) for n in (0, 1)
    )
    assert plain.tokens == looked.tokens == [expected]
    assert looked.drafted[0] > plain.drafted[0]


@pytest.mark.parametrize(
    ("keep", "complaint"), [(0.01, "keep: 0.01 of"), (0.99, "keep: 0.99 of")], ids=["too few", "too many"]
)
def test_a_share_that_cannot_be_kept_is_refused(mobilevlm, keep, complaint):
    with pytest.raises(ConfigError, match=complaint):
        answer(mobilevlm.base, mobilevlm.twig(GEOMETRY), mobilevlm.prompts([0]), Decoding(4, keep=keep))


def test_sampling_keeps_the_distribution(mobilevlm):
    """Two tokens drawn with drafts: their pairs follow the base's own probabilities (chi-square)."""
    generator = torch.Generator().manual_seed(0)

    def peaked(scores: torch.Tensor) -> torch.Tensor:
        """Leave the three most probable tokens, so that pairs are few."""
        third = scores.topk(3, dim=-1).values[..., -1:]
        return (scores / 3).masked_fill(scores < third, float("-inf"))

    base, prompts, twig = mobilevlm.base, mobilevlm.prompts([3]), mobilevlm.twig(GEOMETRY)
    how = Decoding(3, delta=2, threshold=0, choice=Sampling(peaked, generator))
    assert_pairs_follow_the_base(
        base, prompts, GEOMETRY, peaked, lambda: answer(base, twig, prompts, how), draws=1500
    )
