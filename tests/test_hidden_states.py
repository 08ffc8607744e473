"""Hidden states are those of transformers, of a stub as of the whole model, whatever the batch holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import family_specimens
import pytest
import tiny_families
import torch

from pipeline.conformance.specimen import Specimen, answers_of
from pipeline.errors import ConfigError
from pipeline.models.anatomy import anatomy_of
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.stub import load_teacher
from pipeline.models.tap import final_norm
from pipeline.models.teacher_plan import plan_teacher, plan_tensors
from pipeline.models.vlm import VisionLanguageModel
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.final_hidden import FinalHiddenTarget
from pipeline.targets.hidden_states import HiddenStatesTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.query_attention import QueryAttentionTarget

LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3])
NUM_LAYERS = 4  # of the fixture's teacher


@pytest.fixture(scope="module")
def specimens(family_folder) -> Callable[[str], Specimen]:
    return functools.cache(lambda family: family_specimens.specimen_of_family(family, family_folder(family)))


def load(folder, **targets: Any):
    plan = plan_teacher(str(folder), targets=targets)
    return load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))


def forward(teacher, batch):
    return teacher.forward(batch, batch.encoded_by(teacher.encode_images))


@pytest.fixture
def batch(make_batch):
    return make_batch(*LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@torch.no_grad()
def test_equal_to_what_transformers_returns(family, specimens):
    specimen = specimens(family)
    vlm, batch, features = specimen.vlm, specimen.batch(), specimen.features()
    outputs = vlm.network(**vlm.inputs(batch, features), use_cache=False, output_hidden_states=True)
    real, num_layers = batch["attention_mask"].bool(), len(vlm.decoder.layers)
    assert len(outputs.hidden_states) == num_layers + 1
    for layer, theirs in enumerate(outputs.hidden_states):
        made = vlm.forward(batch, features, hidden_layer=layer, answers=answers_of(batch))
        assert made.hidden is not None and made.final is not None
        mine = final_norm(vlm.decoder)(made.hidden) if layer == num_layers else made.hidden
        added = torch.zeros_like(theirs)
        if 0 < layer < num_layers and features.deepstack:
            # Qwen3-VL adds to a layer's output before the next one reads it; transformers returns the output.
            added[batch["is_vision"]] = torch.cat([image[layer - 1] for image in features.deepstack])
        torch.testing.assert_close(mine[real], (theirs + added)[real], atol=1e-6, rtol=0)
    torch.testing.assert_close(made.final, outputs.hidden_states[-1][answers_of(batch)], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_stub_of_every_family_equals_the_whole_model(family, specimens):
    specimen = specimens(family)
    batch, features = specimen.batch(), specimen.features()
    real = batch["attention_mask"].bool()
    for layer in range(len(specimen.vlm.decoder.layers) + 1):
        targets = {"hidden_states": HiddenStatesTarget(layer=layer)}
        plan = plan_tensors(Checkpoint(str(specimen.plan.checkpoint.folder)), specimen.plan.config, targets)
        stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
        assert plan.is_stub and len(plan.tensors) < len(specimen.plan.tensors)
        with torch.no_grad():
            whole = specimen.vlm.forward(batch, features, hidden_layer=layer).hidden
        sizes = [size for sample in specimen.samples for size in sample.sizes]
        mine = stub.forward(batch, stub.encode_images(specimen.pixels(), sizes)).hidden
        assert torch.equal(mine[real], whole[real])


@pytest.mark.parametrize("layer", range(NUM_LAYERS + 1))
def test_a_stub_holds_the_layers_before_and_nothing_behind(layer, teacher_folder):
    plan = plan_teacher(str(teacher_folder), targets={"hidden_states": HiddenStatesTarget(layer=layer)})
    anatomy = anatomy_of(plan.config)
    layers = [f"layer {n}{kind}" for n in range(layer) for kind in ("", " attention")]
    groups = ("vision", "embeddings", *layers)
    wanted = {name for name, group in anatomy.groups().items() if group in groups}
    assert set(plan.tensors) == wanted and plan.is_stub
    assert len({name for name in wanted if name.startswith(anatomy.layers)}) == 9 * layer


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("attention", [None, 0, 3])
def test_attention_before_and_behind_is_kept_in_the_same_forward(layer, attention, teacher_folder, batch):
    targets: dict[str, Any] = {"hidden_states": HiddenStatesTarget(layer=layer)}
    if attention is not None:
        targets |= {
            "attention": AttentionTarget(layers=[attention]),
            "query_attention": QueryAttentionTarget(layer=min(attention, 1)),
        }
    stub, whole = load(teacher_folder, **targets), load(teacher_folder, **targets, logits=LogitsTarget())
    assert stub.plan.is_stub and not whole.plan.is_stub
    mine, theirs = forward(stub, batch), forward(whole, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(mine.hidden[real], theirs.hidden[real]) and mine.answer_logits is None
    if attention is not None:
        assert torch.equal(mine.attention[attention], theirs.attention[attention])
        assert torch.equal(mine.query_attention, theirs.query_attention)


@pytest.mark.parametrize("layer", [0, 1, 4])
def test_nothing_behind_the_hidden_states_runs(layer, teacher_folder, batch):
    stub = load(teacher_folder, hidden_states=HiddenStatesTarget(layer=layer))
    decoder = stub.vlm.decoder
    for module in (*decoder.layers[layer:], final_norm(decoder), stub.vlm.network.get_output_embeddings()):
        module.register_forward_hook(lambda *_: pytest.fail("a module behind the hidden states ran"))
    assert forward(stub, batch).hidden.isfinite().all()


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_neither_the_batch_nor_the_padding_changes_a_sample(layer, teacher_folder, batch):
    stub = load(teacher_folder, hidden_states=HiddenStatesTarget(layer=layer))
    together = forward(stub, batch).hidden
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    padded = stub.forward(other, batch.encoded_by(stub.encode_images)).hidden
    real = batch["attention_mask"].bool()
    assert not bool(real.all()) and torch.equal(padded[real], together[real])
    for row, alone in enumerate(batch.one_by_one()):
        [mine] = forward(stub, alone).hidden
        torch.testing.assert_close(together[row, : len(mine)], mine, atol=1e-5, rtol=1e-5)


def test_the_head_makes_the_logits_of_the_final_hidden_states(teacher_folder, batch):
    whole = load(teacher_folder, final_hidden=FinalHiddenTarget(), logits=LogitsTarget())
    made = forward(whole, batch)
    head = whole.vlm.network.get_output_embeddings()
    assert made.answer_hidden.shape == (8, 32)
    assert torch.equal(head(made.answer_hidden), made.answer_logits)


def test_a_layer_that_the_decoder_lacks_is_refused(teacher_folder):
    with pytest.raises(
        ConfigError,
        match=r"targets.hidden_states.layer asks for what layer 5 gives, but the teacher's decoder has 4 layers; "
        r"ask for 0 \(the embeddings\) to 4",
    ):
        plan_teacher(str(teacher_folder), targets={"hidden_states": HiddenStatesTarget(layer=5)})


def test_hidden_states_carry_the_gradient_of_the_layers_before(tiny_model, make_batch):
    vlm, batch = VisionLanguageModel(tiny_model()), make_batch(*LAYOUTS)
    made = vlm.forward(batch, batch.encoded_by(vlm.encode), hidden_layer=1, stop_at=-1)
    made.hidden.sum().backward()
    layers = vlm.decoder.layers
    assert all(p.grad is not None for p in layers[0].parameters())
    assert all(p.grad is None for p in layers[1].parameters()) and made.logits is None
