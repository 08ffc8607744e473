"""Where images stand in a sequence: by hand on small cases, and against a slow list-by-list oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.merge import ImageCountError, merge_vision_tokens, merged_positions
from pipeline.positions import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    Counts,
    find_slots,
)

IMAGE = IMAGE_TOKEN_INDEX
NUM_VISION_TOKENS = 3

layouts = st.lists(
    st.lists(st.sampled_from([5, 6, 7, IMAGE]), min_size=1, max_size=7), min_size=1, max_size=4
)


def pad(samples: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask 'B S'."""
    length = max(len(sample) for sample in samples)
    ids = torch.tensor([sample + [0] * (length - len(sample)) for sample in samples])
    mask = torch.tensor([[True] * len(sample) + [False] * (length - len(sample)) for sample in samples])
    return ids, mask


def merge(samples: list[list[int]]):
    """Text embeds as (id, 0), vision tokens as (image number, token number + 1); labels are the ids."""
    ids, mask = pad(samples)
    text = torch.stack([ids.float(), torch.zeros_like(ids, dtype=torch.float)], dim=-1)
    num_images = int((ids == IMAGE).sum())
    image = torch.arange(num_images).float()[:, None].expand(-1, NUM_VISION_TOKENS)
    token = torch.arange(1.0, NUM_VISION_TOKENS + 1).expand(num_images, -1)
    features = torch.stack([image, token], dim=-1) if num_images else None
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    return merge_vision_tokens(
        ids, text, features, attention_mask=mask, labels=labels, num_vision_tokens=NUM_VISION_TOKENS
    )


def oracle(samples: list[list[int]]):
    """Per sample: embeds, labels, text slots, vision slots, as plain lists."""
    image, merged = 0, []
    for sample in samples:
        embeds, labels, text, vision = [], [], [], []
        for token in sample:
            if token == IMAGE:
                vision += range(len(embeds), len(embeds) + NUM_VISION_TOKENS)
                embeds += [[float(image), float(n + 1)] for n in range(NUM_VISION_TOKENS)]
                labels += [IGNORE_INDEX] * NUM_VISION_TOKENS
                image += 1
            else:
                if vision:
                    text.append(len(embeds))
                embeds.append([float(token), 0.0])
                labels.append(token)
        merged.append((embeds, labels, text, vision))
    return merged


def unpadded(slots: torch.Tensor) -> list[list[int]]:
    return [[int(position) for position in row if position >= 0] for row in slots]


@given(layouts)
def test_images_of_any_number_and_place_stand_where_their_placeholders_stood(samples):
    merged = merge(samples)
    wanted = oracle(samples)
    for row, (embeds, labels, _, _) in enumerate(wanted):
        length = len(embeds)
        assert merged.inputs_embeds[row, :length].tolist() == embeds
        assert merged.labels[row, :length].tolist() == labels
        assert merged.attention_mask[row].tolist() == [p < length for p in range(merged.labels.shape[1])]
        assert not merged.inputs_embeds[row, length:].any()
        assert set(merged.labels[row, length:].tolist()) <= {IGNORE_INDEX}
    assert unpadded(merged.slots.text) == [text for _, _, text, _ in wanted]
    assert unpadded(merged.slots.vision) == [vision for _, _, _, vision in wanted]


@given(layouts)
def test_counts_before_the_merge_are_those_after_it(samples):
    ids, mask = pad(samples)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask, IGNORE_INDEX)}
    batch["labels"] = batch["labels"].masked_fill(ids == IMAGE, IGNORE_INDEX)
    merged = merge(samples)
    counts = Counts.of(batch)
    assert int(counts.images.sum()) * NUM_VISION_TOKENS == int((merged.slots.vision >= 0).sum())
    assert counts.text_rows.tolist() == (merged.slots.text >= 0).sum(dim=1).tolist()
    assert counts.answers.tolist() == (merged.labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
    follows = [any(t != IMAGE for t in s[at:]) for s in samples for at, t in enumerate(s) if t == IMAGE]
    assert int(counts.attended_images.sum()) == sum(follows)


def test_first_positions_and_lengths_count_an_image_as_its_tokens():
    ids = torch.tensor([[1, IMAGE, 5, 6], [1, 5, IMAGE, IMAGE]])
    starts, lengths = merged_positions(ids, 144)
    assert starts.tolist() == [[0, 1, 145, 146], [0, 1, 2, 146]]
    assert lengths.tolist() == [147, 290]


def test_slots_are_padded_with_minus_one():
    slots = find_slots(
        is_vision=torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool),
    )
    assert slots.text.tolist() == [[3, 4], [-1, -1]]
    assert slots.vision.tolist() == [[1, 2], [-1, -1]]


def test_padding_on_the_left_is_no_text_row():
    ids = torch.tensor([[0, 0, IMAGE, 5]])
    mask = torch.tensor([[False, False, True, True]])
    merged = merge_vision_tokens(
        ids, torch.zeros(1, 4, 2), torch.ones(1, 3, 2), attention_mask=mask, num_vision_tokens=3
    )
    assert merged.slots.text.tolist() == [[5]] and merged.slots.vision.tolist() == [[2, 3, 4]]
    assert merged.attention_mask.tolist() == [[False, False, True, True, True, True]]


def test_without_mask_and_labels_all_is_real_and_nothing_is_a_label():
    merged = merge_vision_tokens(torch.tensor([[5, 6]]), torch.zeros(1, 2, 4), None, num_vision_tokens=3)
    assert merged.attention_mask.all() and set(merged.labels.flatten().tolist()) == {IGNORE_INDEX}
    assert merged.slots.text.shape == merged.slots.vision.shape == (1, 0)


def test_gradient_reaches_text_and_images():
    text, features = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 3, 2, requires_grad=True)
    merged = merge_vision_tokens(torch.tensor([[5, IMAGE, 6]]), text, features, num_vision_tokens=3)
    merged.inputs_embeds.sum().backward()
    assert text.grad.tolist() == [[[1, 1], [0, 0], [1, 1]]]
    assert features.grad.tolist() == [[[1, 1]] * 3]


@pytest.mark.parametrize(("num_images", "found"), [(0, 0), (1, 1), (3, 3)])
def test_another_number_of_images_than_placeholders_is_refused(num_images, found):
    ids = torch.tensor([[5, IMAGE, IMAGE, 6]])
    features = torch.zeros(num_images, 3, 2) if num_images else None
    with pytest.raises(
        ImageCountError, match=rf"2 image placeholders \(-200\) but {found} images; give one image"
    ):
        merge_vision_tokens(ids, torch.zeros(1, 4, 2), features, num_vision_tokens=3)
