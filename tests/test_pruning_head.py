"""The pruning head: the published formula in every family, in training as in decoding, saved with its twig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from twig_models import FAMILIES, TwigSpecimen, kept_by, made_once, oracle

from pipeline.positions import find_slots
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.decoding.generate import Decoding, answer
from pipeline.twig.decoding.session import Session
from pipeline.twig.folder import load_twig, save_twig
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.module import Twig

PLACE = Geometry(1, 2, 5, 6)


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> Callable[[str], TwigSpecimen]:
    return made_once(tmp_path_factory.mktemp)


def scores_of(one: TwigSpecimen, twig: Twig, chosen: list[int]) -> tuple[Tensor, Tensor]:
    """Return the scores as decoding reads them, 'B J', and the columns."""
    session = Session(
        one.base, twig, one.prompts(chosen), first=PLACE.attach_layer, wipe=PLACE.wipe_layer, room=1
    )
    return session.read_with_twig(session.read_prompts())[1], session.slots.vision


def rotated(values: Tensor, norm: Any, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return queries or keys 'S H d' of one sample as attention gets them, 'H S d'; by halves, as in LLaMA."""
    values = (values if norm is None else norm(values)).transpose(0, 1)
    half = values.shape[-1] // 2
    turned = torch.cat([-values[..., half:], values[..., :half]], dim=-1)
    return values * cosines + turned * sines


def by_hand(one: TwigSpecimen, twig: Twig, number: int) -> Tensor:
    """Return the formula's scores of one sample without padding, from projections, norms and rotation by hand."""
    prompts = one.prompts([number])
    inputs = LayerInputs.record(one.base.network, prompts.extended(0, one.base.network.config.model_type))
    hidden, last = inputs.embeds, PLACE.attach_layer + PLACE.num_layers - 1
    for layer, kind in zip(one.base.layers[: PLACE.attach_layer], inputs.kinds, strict=False):
        hidden = layer(hidden, **kind.whole())
    for layer, kind in zip(twig.layers[:-1], inputs.kinds[PLACE.attach_layer :], strict=False):
        hidden = layer(hidden, **kind.whole())
    layer: Any = twig.layers[-1]
    x, attention = layer.input_layernorm(hidden)[0], layer.self_attn
    cosines, sines = (one_of[..., 0, :, :] for one_of in inputs.kinds[last].rotary)
    width = attention.head_dim
    queries = rotated(
        attention.q_proj(x).unflatten(1, (-1, width)), getattr(attention, "q_norm", None), cosines, sines
    )
    keys = rotated(
        attention.k_proj(x).unflatten(1, (-1, width)), getattr(attention, "k_norm", None), cosines, sines
    )
    head: Any = twig.pruning_head
    gates = [linear(x).unflatten(1, (-1, width)).transpose(0, 1) for linear in (head.query, head.key)]
    of_query, of_key = (gate.clamp(min=0) / (1 + torch.exp(-gate)) for gate in gates)
    queries, keys = queries * of_query, keys * of_key
    at = prompts.is_vision[0].nonzero()[:, 0]
    shares = [
        (queries[h, -1] @ keys[h * len(keys) // len(queries)][at].T * attention.scaling).softmax(dim=-1)
        for h in range(len(queries))
    ]
    return torch.stack(shares).mean(dim=0)


def with_images(one: TwigSpecimen) -> list[int]:
    """Return the samples whose prompt has an image."""
    return [n for n in range(one.num_prompts) if bool(one.prompts([n]).is_vision.any())]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("qwen2_5_vl", "qwen3_vl")])
@torch.no_grad()
def test_the_scores_are_those_of_the_formula(family, specimens):
    one = specimens(family)
    twig = one.twig(PLACE, seed=1, prunes=True)
    for number in with_images(one):
        scores, _ = scores_of(one, twig, [number])
        torch.testing.assert_close(scores[0], by_hand(one, twig, number), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_shares_and_those_of_a_batch_are_those_of_each_alone(family, specimens):
    one = specimens(family)
    twig = one.twig(PLACE, seed=1, prunes=True)
    together, vision = scores_of(one, twig, list(range(one.num_prompts)))
    has_image = (vision >= 0).any(dim=1)
    torch.testing.assert_close(together.sum(dim=1), has_image.float())
    assert not together[vision < 0].any()
    for number in with_images(one):
        alone, _ = scores_of(one, twig, [number])
        torch.testing.assert_close(together[number, : alone.shape[1]], alone[0], atol=1e-6, rtol=1e-4)
    assert together.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_training_scores_as_decoding_does(family, specimens):
    one = specimens(family)
    twig = one.twig(PLACE, seed=2, prunes=True)
    prompts = one.prompts(list(range(one.num_prompts)))
    inputs = LayerInputs.record(one.base.network, prompts.inputs)
    hidden = inputs.embeds
    for layer, kind in zip(one.base.layers[: PLACE.attach_layer], inputs.kinds, strict=False):
        hidden = layer(hidden, **kind.whole())
    if family == "qwen3_vl":  # whose first layers' outputs get the deepstack features of its images
        hidden = hidden + inputs.added[0]
    slots = find_slots(prompts.is_vision, prompts.inputs["attention_mask"])
    rows = torch.full((len(hidden),), prompts.length - 1)
    answers = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    _, trained = twig(hidden, inputs, answers, rows, slots.vision)
    decoded, _ = scores_of(one, twig, list(range(one.num_prompts)))
    torch.testing.assert_close(decoded, trained, atol=1e-6, rtol=1e-4)


def test_scores_reach_the_gates_and_the_layers(specimens):
    one = specimens("mobilevlm")
    twig = one.twig(PLACE, seed=2, prunes=True).requires_grad_(True)
    scores, _ = scores_of(one, twig, with_images(one))
    scores.square().sum().backward()
    reached = {name for name, p in twig.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"pruning_head.query.weight", "pruning_head.key.weight"} < reached
    assert "layers.0.mlp.up_proj.weight" in reached and "layers.1.self_attn.q_proj.weight" in reached
    assert not any(name.startswith(("layers.1.mlp", "norm", "head")) for name in reached)


@torch.no_grad()
def test_a_batch_of_text_alone_has_no_scores_and_gives_the_head_a_gradient_of_zero(specimens):
    one = specimens("mobilevlm")
    twig = one.twig(PLACE, seed=2, prunes=True).requires_grad_(True)
    text = [n for n in range(one.num_prompts) if n not in with_images(one)]
    with torch.enable_grad():
        scores, _ = scores_of(one, twig, text)
        scores.sum().backward()
    assert scores.shape == (len(text), 0)
    assert twig.pruning_head is not None
    assert all(p.grad is not None and not p.grad.any() for p in twig.pruning_head.parameters())


@pytest.mark.parametrize("family", ["mobilevlm", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_the_text_is_that_of_the_base_pruned_by_the_head(family, specimens):
    one = specimens(family)
    twig = one.twig(PLACE, seed=3, prunes=True)
    for number in with_images(one):
        prompts = one.prompts([number])
        kept = kept_by(one, twig, prompts, 0.4)
        found = answer(one.base, twig, prompts, Decoding(6, frozenset(), 0.4)).tokens
        assert found == [oracle(one.base, prompts, kept, PLACE, max_new_tokens=6)]


def test_it_is_saved_with_its_twig(specimens, tmp_path):
    one = specimens("mobilevlm")
    twig = one.twig(PLACE, seed=3, prunes=True)
    base = BaseIdentity.of_network(one.base.network)
    save_twig(tmp_path, twig.state_dict(), PLACE, base)
    loaded = load_twig(tmp_path, one.base.network)
    assert loaded.pruning_head is not None
    for (name, mine), (_, theirs) in zip(loaded.state_dict().items(), twig.state_dict().items(), strict=True):
        assert torch.equal(mine, theirs), name
