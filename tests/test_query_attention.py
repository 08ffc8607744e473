"""Attention of one position to the vision columns: eager attention's row, whole or over these columns alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.tap import QueryAndKey, query_to_vision, recording
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import find_slots

LAYOUTS = ([3, IMAGE, 5], [6], [IMAGE, 1, IMAGE, 4], [2, IMAGE, IMAGE, 3])
LAYER = 1


def kept_of(model, batch) -> QueryAndKey:
    vlm = VisionLanguageModel(model)
    with recording([LAYER]) as made:
        vlm.network(**vlm.inputs(batch, batch.encoded_by(vlm.encode)), use_cache=False)
    return made.kept[LAYER]


def vision_of(batch):
    return find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"]).vision


@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
@torch.no_grad()
def test_equal_to_eager_attention_whole_and_renormalised_over_the_vision_columns(
    num_key_value_heads, tiny_model, make_batch
):
    model, eager = (tiny_model(num_key_value_heads=num_key_value_heads) for _ in range(2))
    batch = make_batch(*LAYOUTS)
    kept, vision = kept_of(model, batch), vision_of(batch)
    rows = batch["attention_mask"].sum(dim=1) - 3
    eager.set_attn_implementation("eager")
    probabilities = eager(**batch.inputs(), output_attentions=True).attentions[LAYER]
    whole, alone = (query_to_vision(kept, rows, vision, whole_row=whole) for whole in (True, False))
    assert whole.dtype == alone.dtype == torch.float32 and whole.shape == alone.shape == (4, 4, 8)
    for row, columns in enumerate(vision):
        columns = columns[columns >= 0]
        wanted = probabilities[row, :, rows[row]][:, columns]
        torch.testing.assert_close(whole[row, :, : len(columns)], wanted, atol=1e-6, rtol=1e-5)
        wanted = wanted / wanted.sum(dim=1, keepdim=True)
        torch.testing.assert_close(alone[row, :, : len(columns)], wanted, atol=1e-6, rtol=1e-5)
        assert not whole[row, :, len(columns) :].any() and not alone[row, :, len(columns) :].any()
    assert alone.max() > 0.5  # the random models attend to something


@pytest.mark.parametrize("whole_row", [True, False])
@torch.no_grad()
def test_columns_behind_the_position_and_samples_without_one_are_zero(whole_row, tiny_model, make_batch):
    batch = make_batch([1, IMAGE, 1, IMAGE, 2], [2, IMAGE, 3], [1, IMAGE, 9])
    rows = torch.tensor([5, -1, 0])  # between the images; nowhere; before the image
    found = query_to_vision(kept_of(tiny_model(), batch), rows, vision_of(batch), whole_row=whole_row)
    assert found[0, :, :4].all() and not found[0, :, 4:].any() and not found[1:].any()
    if not whole_row:
        torch.testing.assert_close(found[0].sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("whole_row", [True, False])
@torch.no_grad()
def test_text_alone_has_no_columns(whole_row, tiny_model, make_batch):
    batch = make_batch([4], [7])
    found = query_to_vision(
        kept_of(tiny_model(), batch), torch.tensor([1, 2]), vision_of(batch), whole_row=whole_row
    )
    assert found.shape == (2, 4, 0)


def test_a_head_with_no_mass_on_the_image_still_sums_to_one():
    """The first key draws all mass in float32; the renormalised row would be 0 / 0."""
    query, key = torch.ones(1, 1, 4, 1), torch.tensor([[[[300.0], [0.0], [1.0], [0.0]]]])
    kept = QueryAndKey(query, key, None, 1.0, is_causal=True)
    rows, vision = torch.tensor([3]), torch.tensor([[1, 2]])
    assert query_to_vision(kept, rows, vision, whole_row=True).tolist() == [[[0.0, 0.0]]]
    torch.testing.assert_close(
        query_to_vision(kept, rows, vision, whole_row=False)[0, 0], torch.tensor([0.0, 1.0]).softmax(0)
    )


@pytest.mark.parametrize("is_additive", [False, True])
def test_the_models_own_mask_decides_what_the_position_sees(is_additive):
    sees = torch.tensor([True, False, False, True]).expand(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~sees, torch.finfo().min) if is_additive else sees
    kept = QueryAndKey(torch.zeros(1, 2, 4, 8), torch.ones(1, 1, 4, 8), mask, 1.0, is_causal=True)
    rows, vision = torch.tensor([3]), torch.tensor([[0, 1]])
    assert query_to_vision(kept, rows, vision, whole_row=True).tolist() == [[[0.5, 0.0]] * 2]
    assert query_to_vision(kept, rows, vision, whole_row=False).tolist() == [[[1.0, 0.0]] * 2]


@pytest.mark.parametrize("whole_row", [True, False])
def test_gradient_is_finite_also_where_columns_are_masked(whole_row, tiny_model, make_batch):
    query = torch.randn(2, 2, 6, 4, requires_grad=True)
    key = torch.randn(2, 1, 6, 4, requires_grad=True)
    kept = QueryAndKey(query, key, None, 0.5, is_causal=True)
    rows, vision = torch.tensor([3, 1]), torch.tensor([[0, 1, 4], [2, 3, -1]])  # the second sees no column
    query_to_vision(kept, rows, vision, whole_row=whole_row).square().sum().backward()
    assert query.grad is not None and key.grad is not None
    assert query.grad.isfinite().all() and key.grad.isfinite().all()
    assert query.grad[0, :, 3].any() and not query.grad[1].any() and not query.grad[:, :, 5].any()
