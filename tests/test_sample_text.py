"""A sample in a terminal: every token, what is trained, where the images are, what the teacher would say."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.text import Text

from pipeline.inspection.sample import Answer, Inspection, inspect_sample
from pipeline.inspection.sample_text import GIVEN, IMAGE, TRAINED, describe_sample
from pipeline.positions import Slots


@pytest.fixture(scope="module")
def inspect(experiment):
    """Inspects a sample of the experiment's store."""
    return lambda key, **options: inspect_sample(experiment.store, key, **options)


def small(seen: Inspection, **changes) -> Inspection:
    """A sample of a few tokens, with an image of four vision tokens among them."""
    made = replace(
        seen,
        input_ids=(1, 7, -200, -200, -200, -200, 8, 9, 10, 2),
        labels=(*[-100] * 8, 10, 2),
        tokens=("<s>", " What", *["<image>"] * 4, "\n", " is:", " a b", "</s>"),
        slots=Slots(torch.tensor([[6, 7, 8, 9]]), torch.tensor([[2, 3, 4, 5]]), seen.sizes),
        answers=(
            Answer(8, ((" a b", 0.75), (" c", 0.2), ("\n", 0.01), (" d", 0.0002), (" e", 0.0001))),
            Answer(9, ((" c", 0.9), ("</s>", 0.1))),
        ),
    )
    return replace(made, **changes)


def lines(seen: Inspection) -> list[str]:
    return describe_sample(seen).plain.split("\n")


def styles(text: Text, word: str) -> set[str]:
    """Styles of every place where a word stands."""
    found = set()
    for span in text.spans:
        if word in text.plain[span.start : span.end]:
            found.add(str(span.style))
    return found


def test_tokens_images_and_answers_can_be_read_without_colour(inspect):
    seen = small(inspect("a0"))
    assert lines(seen) == [
        f"a0 in {seen.store}",
        "6 text tokens, 1 image of 4 vision tokens: 10 positions; 2 tokens trained",
        "",
        "<s> ␣What [image 1: 2 x 2 vision tokens at 2 to 5] ↵ ␣is: »␣a␣b </s>«",
        "",
        "»trained«  [image]  all else is given",
        "",
        "trained  the teacher's likeliest",
        "␣a␣b     ␣a␣b 75.0%  ␣c 20.0%  ↵ 1.0%  ␣d <0.1%",
        "</s>     ␣c 90.0%  </s> 10.0%  not what is trained",
    ]


def test_neighbouring_tokens_trained_tokens_and_images_differ_in_colour(inspect):
    text = describe_sample(small(inspect("a0")))
    assert styles(text, "␣a␣b") <= {*TRAINED, *GIVEN} and TRAINED[0] in styles(text, "␣a␣b")
    assert GIVEN[1] in styles(text, "␣What") and TRAINED[0] not in styles(text, "␣What")
    assert styles(text, "[image 1: 2 x 2 vision tokens at 2 to 5]") == {IMAGE}


def test_a_terminal_shows_the_colours_and_a_file_does_not(inspect):
    shown = {}
    for colours in ("standard", None):
        file = io.StringIO()
        console = Console(file=file, width=100, force_terminal=colours is not None, color_system=colours)
        console.print(describe_sample(small(inspect("a0"))))
        shown[colours] = file.getvalue()
    assert "\x1b[1;36m␣a␣b\x1b[0m" in shown["standard"]
    assert "\x1b" not in shown[None] and "»␣a␣b </s>«" in shown[None]


def test_the_images_stand_where_their_vision_tokens_do(inspect):
    seen = inspect("apart")
    text = describe_sample(seen).plain
    for image in range(2):
        positions = seen.slots.vision[0, 4 * image : 4 * image + 4].tolist()
        assert f"[image {image + 1}: 2 x 2 vision tokens at {positions[0]} to {positions[-1]}]" in text
    assert "2 images of 4 vision tokens" in text


def test_tiles_of_an_image_are_divided_by_text_and_images_differ_in_size(inspect):
    seen = small(
        inspect("two"),
        input_ids=(1, -200, -200, 7, -200, -200, 8, -200, 9),
        labels=(-100,) * 9,
        tokens=("<s>", "<image>", "<image>", "tile", "<image>", "<image>", "end", "<image>", "?"),
        slots=Slots(torch.tensor([[3, 6, 8]]), torch.tensor([[1, 2, 4, 5, 7]]), (4, 1)),
        sizes=(4, 1),
        grids=((0, 0), (1, 1)),
        answers=(),
    )
    assert lines(seen)[1] == "4 text tokens, 2 images of 1 to 4 vision tokens: 9 positions; 0 tokens trained"
    assert lines(seen)[3] == (
        "<s> [image 1: 2 vision tokens at 1 to 2] tile [image 1: 2 vision tokens at 4 to 5] end "
        "[image 2: 1 x 1 vision tokens at 7 to 7] ?"
    )


def test_every_answer_of_a_conversation_is_marked(inspect):
    text = describe_sample(inspect("late")).plain
    assert (
        "ASSISTANT : »" in text and text.count("»") == text.count("«") == 2 + 1
    )  # and the one that explains it
    assert "</s>« ␣USER : ␣ [image 1: " in text


def test_a_text_alone_is_described_too(inspect):
    text = describe_sample(inspect("t1")).plain
    assert "vision tokens" not in text and "text tokens: " in text and "»␣no </s>«" in text


def test_a_store_without_logits_says_that_it_knows_no_answers(inspect):
    seen = small(inspect("a0"), answers=(Answer(8, ()), Answer(9, ())))
    assert lines(seen)[-1] == "The store has no logits, so the teacher's answers are not known."


def test_ids_in_place_of_text_are_explained(inspect):
    seen = small(inspect("a0"), note="student.model s is not here")
    assert "Numbers are token ids, because there is no tokenizer: student.model s is not here." in lines(seen)
