"""Questions that share a prefix in one sequence give the same loss as one sample a question."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.template_preparation import expanded
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.positions import IGNORE_INDEX
from pipeline.studies.shared_prefix import ImageQuestions, answer_loss, group_by_image, shared_prefix_row

FIRST = ImageQuestions("a", (1, IMAGE, 9), (((3, 4), (-100, 4)), ((5, 6, 7), (-100, 6, 7))))
SECOND = ImageQuestions("b", (1, IMAGE, 9), (((8, 10, 11, 12), (-100, -100, 11, 12)),))


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))


def test_a_row_numbers_the_prefix_once_and_every_branch_from_its_end():
    assert shared_prefix_row(FIRST, 2) == [
        (1, -100, -1, 0),
        (IMAGE, -100, -1, 1),
        (IMAGE, -100, -1, 2),
        (9, -100, -1, 3),
        (3, -100, 0, 4),
        (4, 4, 0, 5),
        (5, -100, 1, 4),
        (6, 6, 1, 5),
        (7, 7, 1, 6),
    ]


@torch.no_grad()
def test_the_loss_is_that_of_one_sample_a_question(tiny_model, features):
    model = tiny_model()
    total, count = 0.0, 0
    for item, patches in zip((FIRST, SECOND), features, strict=True):
        vision = {"image": model.get_image_features(patch_features=patches[None])}
        for ids, labels in item.branches:
            wanted = [IGNORE_INDEX] * len(item.prefix) + list(labels)
            sample = expanded([*item.prefix, *ids], wanted, num_vision_tokens=4)
            num_labels = sum(label != IGNORE_INDEX for label in labels)
            input_ids, labels_of_all = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
            loss = model(input_ids, labels=labels_of_all, mm_encoder_outputs=vision).loss
            total, count = total + loss.item() * num_labels, count + num_labels
    assert count == 5
    assert answer_loss(model, [FIRST, SECOND], features).item() == pytest.approx(total / count, abs=1e-5)


def test_an_image_is_cut_where_the_first_of_all_questions_differs(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)

    def record(image: str, question: str, answer: str) -> dict:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"image": image, "conversations": turns}

    asked = [
        record("a", "What is it?", "dog"),
        record("b", "Is it red?", "no"),
        record("a", "Is it a dog?", "yes"),
    ]
    first, second = group_by_image(asked, tokenizer, template="v1")
    assert (first.image, len(first.branches), second.image, len(second.branches)) == ("a", 2, "b", 1)
    assert first.prefix == second.prefix and first.prefix.count(IMAGE) == 1
    assert len({ids[0] for ids, _ in (*first.branches, *second.branches)}) == 2
    assert all(labels[-1] == ids[-1] == tokenizer.eos_token_id for ids, labels in first.branches)
