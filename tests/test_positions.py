"""Where images stand in a sequence: by hand on small cases, and against a slow list-by-list oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import tiny_model

from pipeline.data.preparation import pad_tokens
from pipeline.data.template_preparation import expanded
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.positions import IGNORE_INDEX, Counts, find_slots

SIZE = 3  # vision tokens of an image
MODEL = tiny_model()

layouts = st.lists(
    st.lists(st.sampled_from([5, 6, 7, IMAGE]), min_size=1, max_size=7), min_size=1, max_size=4
)


def batch_of(samples: list[list[int]]):
    """The ids as labels, too; each image as three tokens."""
    labels = ([IGNORE_INDEX if token == IMAGE else token for token in sample] for sample in samples)
    return pad_tokens([expanded(*both, SIZE) for both in zip(samples, labels, strict=True)], IMAGE)


def oracle(samples: list[list[int]]):
    """Per sample: labels, numbers of its vision tokens in the batch, text slots, vision slots, as plain lists."""
    known, batch = 0, []
    for sample in samples:
        labels, numbers, text, vision = [], [], [], []
        for token in sample:
            if token == IMAGE:
                vision += range(len(labels), len(labels) + SIZE)
                numbers += range(known, known + SIZE)
                labels += [IGNORE_INDEX] * SIZE
                known += SIZE
            else:
                if vision:
                    text.append(len(labels))
                labels.append(token)
        batch.append((labels, numbers, text, vision))
    return batch


def unpadded(slots: torch.Tensor) -> list[list[int]]:
    return [[int(position) for position in row if position >= 0] for row in slots]


@given(layouts)
@torch.no_grad()
def test_images_of_any_number_and_place_stand_where_their_placeholders_stood(samples):
    batch, wanted = batch_of(samples), oracle(samples)
    features = torch.randn(int(batch["is_vision"].sum()), 32)
    embeds = MODEL.embed(batch["input_ids"], features if len(features) else None)
    for row, (labels, numbers, _, vision) in enumerate(wanted):
        length, is_text = len(labels), [at for at, label in enumerate(labels) if label != IGNORE_INDEX]
        assert batch["labels"][row].tolist() == labels + [IGNORE_INDEX] * (embeds.shape[1] - length)
        assert batch["attention_mask"][row].tolist() == [int(p < length) for p in range(embeds.shape[1])]
        assert torch.equal(embeds[row, vision], features[numbers])
        ids = torch.tensor(labels, dtype=torch.long)[is_text]
        assert torch.equal(embeds[row, is_text], MODEL.model.embed_tokens(ids))
    slots = find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"])
    assert unpadded(slots.text) == [text for _, _, text, _ in wanted]
    assert unpadded(slots.vision) == [vision for _, _, _, vision in wanted]
    assert slots.sizes == (SIZE,) * sum(sample.count(IMAGE) for sample in samples)


@given(layouts)
def test_counts_before_the_forward_are_those_of_the_slots(samples):
    batch = batch_of(samples)
    slots, counts = find_slots(batch["is_vision"], batch["attention_mask"]), Counts.of(batch)
    assert counts.images.tolist() == [sample.count(IMAGE) for sample in samples]
    assert counts.vision_tokens.tolist() == (slots.vision >= 0).sum(dim=1).tolist()
    assert counts.text_rows.tolist() == (slots.text >= 0).sum(dim=1).tolist()
    assert counts.answers.tolist() == [sum(token != IMAGE for token in sample[1:]) for sample in samples]
    follows = [[any(t != IMAGE for t in s[at:]) for at, t in enumerate(s) if t == IMAGE] for s in samples]
    assert counts.attended_images.tolist() == [sum(of_sample) for of_sample in follows]


def test_images_of_several_sizes_are_kept_apart():
    """Two images side by side, one of a single token before the last text, none, and one that ends its sample."""
    is_vision = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    mask, sizes = torch.ones(4, 5).long(), [(1, 2), (1,), (), (2,)]
    mask[3, 4] = 0
    slots = find_slots(is_vision, mask, sizes)
    assert [of_image.tolist() for of_image in slots.by_image(slots.vision)] == [[1], [2, 3], [3], [2, 3]]
    batch = {"is_vision": is_vision, "attention_mask": mask, "sizes": sizes}
    counts = Counts.of(batch | {"labels": torch.zeros(4, 5)})
    assert (counts.images.tolist(), counts.vision_tokens.tolist()) == ([2, 1, 0, 1], [3, 1, 0, 2])
    assert (counts.text_rows.tolist(), counts.attended_images.tolist()) == ([1, 1, 0, 0], [2, 1, 0, 0])


def test_slots_are_padded_with_minus_one():
    slots = find_slots(
        is_vision=torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool),
    )
    assert slots.text.tolist() == [[3, 4], [-1, -1]]
    assert slots.vision.tolist() == [[1, 2], [-1, -1]]


def test_padding_on_the_left_is_no_text_row():
    samples = [expanded([IMAGE, 5], [IGNORE_INDEX, 5], SIZE), expanded([6] * 6, [6] * 6, SIZE)]
    batch = pad_tokens(samples, IMAGE, on_the_left=True)
    slots = find_slots(batch["is_vision"], batch["attention_mask"])
    assert slots.text[0].tolist() == [5] and slots.vision[0].tolist() == [2, 3, 4]
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch["labels"][0].tolist() == [IGNORE_INDEX] * 5 + [5]


@pytest.mark.parametrize("shape", [(1, SIZE, 32), (SIZE, 32)], ids=["images", "flat"])
def test_gradient_reaches_text_and_images(shape):
    model, features = tiny_model(), torch.randn(shape, requires_grad=True)
    model.embed(torch.tensor([[5, IMAGE, IMAGE, IMAGE, 6]]), features).sum().backward()
    reached = model.model.embed_tokens.weight.grad
    assert reached.any(dim=1).nonzero().flatten().tolist() == [5, 6] and (reached[[5, 6]] == 1).all()
    assert (features.grad == 1).all()
