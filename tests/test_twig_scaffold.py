"""The base without weights gives a twig's layers what the whole base gives them, bit for bit, in every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from twig_models import FAMILIES, TwigSpecimen, made_once

from pipeline.conformance.specimen import answers_of
from pipeline.positions import find_slots, last_prompt_positions
from pipeline.twig.geometry import Geometry
from pipeline.twig.layer_inputs import LayerInputs
from pipeline.twig.scaffold import Scaffold


@pytest.fixture(scope="module")
def specimens(tmp_path_factory) -> Callable[[str], TwigSpecimen]:
    return made_once(tmp_path_factory.mktemp)


def batch_of(specimen: TwigSpecimen, chosen: list[int]) -> dict:
    batch = specimen.specimen.batch(chosen)
    return batch | {"grids": [specimen.specimen.samples[n].grids for n in chosen]}


def places_of(batch: dict) -> tuple[torch.Tensor, ...]:
    """Where a twig is asked for logits and for scores."""
    slots = find_slots(batch["is_vision"], batch["attention_mask"])
    return answers_of(batch), last_prompt_positions(batch["labels"], batch["attention_mask"]), slots.vision


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attach", "num_layers"), [(0, 2), (2, 3), (3, 3)])
@torch.no_grad()
def test_a_twig_sees_from_the_scaffold_what_it_sees_from_the_base(family, attach, num_layers, specimens):
    one = specimens(family)
    twig = one.twig(Geometry(attach, num_layers, 5, 6), seed=3, prunes=True)
    scaffold = Scaffold(one.base.network.config, dtype=torch.float32)
    for chosen in (list(range(one.num_prompts)), [0], [one.num_prompts - 1]):
        batch = batch_of(one, chosen)
        inputs = one.specimen.vlm.inputs(batch, one.specimen.features(chosen))
        real = LayerInputs.record(one.base.network, inputs)
        hidden = one.base.network(**inputs, use_cache=False, output_hidden_states=True).hidden_states[attach]
        asked = places_of(batch)
        mine, theirs = (twig(hidden, made, *asked) for made in (scaffold.inputs(batch), real))
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@torch.no_grad()
def test_a_twig_of_all_layers_is_the_base(specimens):
    for family in FAMILIES:
        one = specimens(family)
        batch = batch_of(one, list(range(one.num_prompts)))
        made = one.specimen.vlm.forward(batch, one.specimen.features(), answers=answers_of(batch))
        inputs = one.specimen.vlm.inputs(batch, one.specimen.features())
        embeds = LayerInputs.record(one.base.network, inputs).embeds
        twig = one.twig(Geometry(0, 6, 5, 6))
        scaffold = Scaffold(one.base.network.config, dtype=torch.float32)
        logits, _ = twig(embeds, scaffold.inputs(batch), *places_of(batch))
        if family != "qwen3_vl":  # whose first layers' outputs get the deepstack features of its images
            torch.testing.assert_close(logits, made.logits, rtol=1e-5, atol=1e-5)
