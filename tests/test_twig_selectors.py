"""Selectors: scores of vision tokens compared with transformers' own attention, and independent of the batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from twig_models import TwigSpecimen, twig_specimen

from pipeline.errors import ConfigError
from pipeline.models.loading import load_network
from pipeline.twig.decoding.generate import Decoding, answer
from pipeline.twig.evaluation.coverage import diverse_order, even_order
from pipeline.twig.evaluation.selectors import Selector, looks, parse_selectors
from pipeline.twig.geometry import Geometry

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(attach_layer=1, num_layers=2, wipe_layer=5, num_base_layers=6)
NUMBERS = (0, 1)  # both have images


@pytest.fixture(scope="module", params=["mobilevlm", "qwen2_5_vl"])
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    return twig_specimen(request.param, tmp_path_factory.mktemp(request.param) / "base")


def selector(name: str) -> Selector:
    (found,) = parse_selectors(name, GEOMETRY)
    return found


@torch.no_grad()
def eager_rows(specimen: TwigSpecimen, number: int) -> list[torch.Tensor]:
    """Return each layer's attention of the last position to the vision tokens of one prompt, mean over heads."""
    network = load_network(str(specimen.folder), dtype=torch.float32).eval()
    network.set_attn_implementation("eager")
    prompts = specimen.prompts([number])
    made = network(**prompts.inputs, output_attentions=True, use_cache=False).attentions
    return [layer[0, :, -1, prompts.is_vision[0]].mean(dim=0) for layer in made]


def test_a_layers_scores_are_those_of_eager_attention_in_any_batch(specimen):
    twig, prompts = specimen.twig(GEOMETRY), specimen.prompts(NUMBERS)
    shares = looks(specimen.base, prompts)
    for row, number in enumerate(NUMBERS):
        expected = eager_rows(specimen, number)
        for layer in (0, 3, 5):
            scores = selector(f"layer {layer}").score(specimen.base, twig, prompts, ["a", "b"])
            count = len(expected[layer])
            assert torch.allclose(scores[row, :count], expected[layer], rtol=1e-4, atol=1e-6)
            assert not scores[row, count:].any()
            assert float(shares[row, layer]) == pytest.approx(float(expected[layer].sum()), rel=1e-4)


def test_a_freshly_copied_twig_scores_as_the_layer_that_it_was_copied_from(specimen):
    """Its last layer is a copy of layer K+T-1, at depth K+T."""
    twig, prompts = specimen.twig(GEOMETRY), specimen.prompts(NUMBERS)
    scores = {
        name: selector(name).score(specimen.base, twig, prompts, ["a", "b"])
        for name in ("twig", "fastv", "fastv+T", "layer 0", "layer 2")
    }
    assert torch.allclose(scores["twig"], scores["fastv+T"], rtol=1e-4, atol=1e-7)
    assert torch.equal(scores["fastv+T"], scores["layer 2"])
    assert torch.equal(scores["fastv"], scores["layer 0"])
    assert not torch.allclose(scores["twig"], scores["fastv"], rtol=1e-2)


def test_a_twig_prunes_by_the_scores_of_its_selector(specimen):
    twig, prompts = specimen.twig(GEOMETRY, seed=2), specimen.prompts(NUMBERS)
    scores = selector("twig").score(specimen.base, twig, prompts, ["a", "b"])
    how = Decoding(8, keep=0.5, delta=0)
    own, given, other = (
        answer(specimen.base, twig, prompts, how, scores=some).tokens for some in (None, scores, -scores)
    )
    assert own == given and own != other


def test_random_scores_depend_on_the_key_alone(specimen):
    twig, chance = specimen.twig(GEOMETRY), selector("random")
    together = chance.score(specimen.base, twig, specimen.prompts(NUMBERS), ["a", "b"])
    for row, (number, key) in enumerate(zip(NUMBERS, ("a", "b"), strict=True)):
        alone = chance.score(specimen.base, twig, specimen.prompts([number]), [key])[0]
        assert torch.equal(together[row, : len(alone)], alone)
    others = chance.score(specimen.base, twig, specimen.prompts(NUMBERS), ["a", "c"])
    assert torch.equal(others[0], together[0]) and not torch.equal(others[1], together[1])


def test_names_are_read_once_each_and_say_which_layer_an_alias_is():
    names = [one.name for one in parse_selectors("twig, fastv,fastv+T,random,layer  4,twig", GEOMETRY)]
    assert names == ["twig", "fastv (layer 0)", "fastv+T (layer 2)", "random", "layer 4"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("twig,best", "selector 'best' is unknown; known are twig, fastv"),
        ("layer 6", "selector 'layer 6': the base's layers are 0 to 5"),
        (" , ", "selectors: none asked for"),
    ],
)
def test_a_name_that_means_nothing_is_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_selectors(text, GEOMETRY)


def test_no_layer_runs_before_a_twig_on_the_embeddings():
    with pytest.raises(ConfigError, match="no layer runs before the twig"):
        parse_selectors("fastv", Geometry(0, 2, 5, 6))


def test_rows_of_all_text_add_up_what_each_row_says(specimen):
    twig, number = specimen.twig(GEOMETRY), NUMBERS[0]
    network = load_network(str(specimen.folder), dtype=torch.float32).eval()
    network.set_attn_implementation("eager")
    prompts = specimen.prompts([number])
    with torch.no_grad():
        made = network(**prompts.inputs, output_attentions=True, use_cache=False).attentions
    is_vision = prompts.is_vision[0]
    text = ~is_vision & (torch.arange(len(is_vision)) > is_vision.nonzero()[0])
    expected = (
        made[2][0].mean(dim=0)[text][:, is_vision].sum(dim=0)
    )  # the twig's last layer is a copy of layer 2
    found = selector("twig rows").score(specimen.base, twig, prompts, ["a"])
    assert torch.allclose(found[0], expected, rtol=1e-4, atol=1e-6)


def test_even_choices_are_spread_at_every_number():
    vision = torch.tensor([list(range(5, 21)), [*range(3, 12), *[-1] * 7]])
    scores = even_order(vision)
    for row, count in ((0, 16), (1, 9)):
        order = scores[row].sort(descending=True).indices[:count].tolist()
        assert sorted(order) == list(range(count))
        for kept in (2, 4, 8):
            places = sorted(order[:kept])
            assert max(b - a for a, b in pairwise(places)) <= 2 * 16 / kept
    assert not scores[1, 9:].any()


def test_diverse_choices_take_one_of_each_kind_before_a_second_one():
    kinds = torch.nn.functional.normalize(
        torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    states = torch.cat([torch.zeros(2, 8), kinds[[0, 1, 0, 2, 0, 3, 1, 0]]])[None]
    vision = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    order = diverse_order(states, vision)[0].sort(descending=True).indices.tolist()
    of_kind = [0, 1, 0, 2, 0, 3, 1, 0]
    assert sorted(of_kind[place] for place in order[:4]) == [0, 1, 2, 3] and sorted(order) == list(range(8))
    attended = torch.tensor([[0.0, 0, 9, 0, 8, 0, 0, 7]])
    mixed = diverse_order(states, vision, attended)[0].sort(descending=True).indices.tolist()
    assert mixed[0] == 2 and mixed[2] == 4 and mixed[4] == 7 and of_kind[mixed[1]] != 0


@pytest.mark.parametrize("name", ["twig rows", "even", "diverse", "twig+diverse"])
def test_rules_that_cover_the_image_do_not_depend_on_the_batch(name, specimen):
    twig, rule = specimen.twig(GEOMETRY, seed=3), selector(name)
    together = rule.score(specimen.base, twig, specimen.prompts(NUMBERS), ["a", "b"])
    for row, number in enumerate(NUMBERS):
        alone = rule.score(specimen.base, twig, specimen.prompts([number]), ["a"])[0]
        count = len(alone)
        assert not together[row, count:].any()
        if name == "twig rows":
            torch.testing.assert_close(together[row, :count], alone, atol=1e-5, rtol=1e-4)
        else:
            assert together[row, :count].argsort().equal(alone.argsort())
