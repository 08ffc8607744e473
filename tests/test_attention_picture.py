"""The picture shows the numbers it was given, in colours that can be read back, and no text lies over another."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.inspection.attention_cells import plan_drawing
from pipeline.inspection.attention_picture import AttentionFigure, draw_attention, percent
from pipeline.inspection.heat_map import DARKEST_GREY, Square, draw_heat, draw_image, outline
from pipeline.inspection.sample import Inspection, attention_distance, inspect_sample
from pipeline.inspection.sheet import Sheet, drawable
from pipeline.positions import IGNORE_INDEX
from pipeline.shapes import ShapeError
from pipeline.teacher_cache.teacher import cache_teacher

MAGMA = colormaps["magma_r"]


@pytest.fixture(scope="module")
def inspect(experiment):
    """Inspects a sample of the experiment's store."""
    return lambda key, **options: inspect_sample(experiment.store, key, **options)


def longer(seen: Inspection, num_text: int, *, token: str = " representation") -> Inspection:
    """The sample with as many text tokens after its only image, the last of them trained."""
    first = seen.text[0]
    attention = torch.rand(4, num_text, 4, generator=torch.Generator().manual_seed(0)) / 4
    text = seen.slots.text[0, 0] + torch.arange(num_text)[None]
    return replace(
        seen,
        input_ids=(*seen.input_ids[:first], *[5] * num_text),
        labels=(*seen.labels[:first], *[IGNORE_INDEX] * (num_text - 1), 5),
        tokens=(*seen.tokens[:first], *[token] * num_text),
        slots=replace(seen.slots, text=text),
        attention={0: attention},
    )


def students(seen: Inspection) -> dict[str, torch.Tensor]:
    teacher = seen.attention[0].mean(dim=0)
    return {"before": teacher.flip(0), "after": 0.9 * teacher}


# What is shown


def test_every_text_token_has_a_cell_with_its_attention(inspect):
    seen = inspect("a0", layer=1)
    (mean, *cells) = plan_drawing(seen, {}, max_tokens=40).images[0]
    attention = seen.attention[1].numpy().mean(axis=0)
    assert mean.name == f"mean of {len(cells)}" and not mean.is_trained
    np.testing.assert_allclose(mean.shares[0], attention.mean(axis=0).reshape(2, 2), rtol=1e-6)
    assert len(cells) == len(attention)
    for cell, row in zip(cells, attention, strict=True):
        np.testing.assert_allclose(cell.shares[0].ravel(), row, rtol=1e-6)
    assert [cell.name for cell in cells[-2:]] == ["␣blue", "</s>"]
    assert [cell.is_trained for cell in cells] == [False] * (len(cells) - 2) + [True] * 2


def test_each_image_has_its_own_columns_and_the_text_after_it(inspect):
    seen = inspect("apart")
    first, second = plan_drawing(seen, {}, max_tokens=100).images
    attention = seen.attention[0].numpy().mean(axis=0)
    assert len(first) == 1 + len(attention)
    num_before = sum(bool(position < seen.slots.vision[0, 4]) for position in seen.slots.text[0])
    assert 0 < num_before < len(attention) and not attention[:num_before, 4:].any()
    assert len(second) == 1 + len(attention) - num_before
    np.testing.assert_allclose(second[1].shares[0].ravel(), attention[num_before, 4:], rtol=1e-6)


def test_students_stand_beside_the_teacher_and_the_last_of_them_is_subtracted(inspect):
    seen = inspect("a0")
    drawing = plan_drawing(seen, students(seen), max_tokens=40)
    assert drawing.headings == ("teacher", "before", "after", "after − teacher")
    for cell in drawing.images[0][1:]:
        teacher, _, after = cell.shares
        np.testing.assert_allclose(after, 0.9 * teacher, rtol=1e-6)
        np.testing.assert_allclose(cell.difference, -0.1 * teacher, rtol=1e-4, atol=1e-9)
    attention = seen.attention[0].mean(dim=0)
    assert drawing.largest_share == pytest.approx(float(attention.max()))
    assert drawing.largest_difference == pytest.approx(0.1 * float(attention.max()), rel=1e-4)


def test_the_words_say_how_far_the_students_are_from_the_teacher(inspect):
    seen = inspect("a0")
    before, after = (attention_distance(seen, student) for student in students(seen).values())
    words = plan_drawing(seen, students(seen), max_tokens=40).words
    assert f"before {before:.3f}, after {after:.3f} nats." in " ".join(words) and 0 < after < before


def test_tokens_that_are_not_shown_are_counted(inspect):
    seen = longer(inspect("a0"), 60)
    drawing = plan_drawing(seen, {}, max_tokens=40)
    assert len(drawing.images[0]) == 1 + 40 and drawing.images[0][0].name == "mean of 60"
    assert "Shown are the first 40 text tokens after the image, of 60 in all." in drawing.words
    assert not any("Shown" in words for words in plan_drawing(seen, {}, max_tokens=60).words)


def test_the_words_say_why_there_is_no_text(inspect):
    seen = replace(inspect("a0"), note="student.model s is not here")
    assert (
        "Token ids in place of text: student.model s is not here."
        in plan_drawing(seen, {}, max_tokens=1).words
    )


def test_a_students_attention_of_another_sample_is_refused(inspect):
    with pytest.raises(ShapeError, match=r"attention of the student after: expected axes 'T J'"):
        plan_drawing(inspect("a0"), {"after": torch.zeros(3, 4)}, max_tokens=40)


@pytest.mark.parametrize(
    ("share", "shown"), [(0.0, "0%"), (0.0042, "0.42%"), (0.0996, "10%"), (0.314, "31%"), (1, "100%")]
)
def test_small_shares_keep_two_digits(share, shown):
    assert percent(share) == shown


# How it looks


def pixels(sheet: Sheet) -> np.ndarray:
    """The figure as uint8 'Y X 3', 100 dots an inch."""
    file = io.BytesIO()
    FigureCanvasAgg(sheet.figure).print_figure(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB"))


WHOLE = Square(0, 0, 2)


def test_a_heat_map_has_the_colours_of_the_scale_over_white_and_darker_ones_over_black():
    heat = np.array([[0.0, 0.1], [0.2, 0.4]])
    for brightness, factor in ((255, 1.0), (0, DARKEST_GREY)):
        sheet = Sheet(2, 2)
        image = Image.new("RGB", (20, 20), (brightness,) * 3)
        draw_heat(sheet.axes, image, heat, WHOLE, colours=MAGMA, scale=Normalize(0, 0.4))
        shown = pixels(sheet)
        for (y, x), share in np.ndenumerate(heat):
            expected = 255 * factor * np.array(MAGMA(share / 0.4)[:3])
            np.testing.assert_allclose(shown[50 + 100 * y, 50 + 100 * x], expected, atol=2)


def test_a_pale_shape_is_seen_below_its_heat_map():
    sheet = Sheet(2, 2)
    image = Image.new("RGB", (20, 20), "white")
    image.paste((255, 255, 0), (0, 0, 10, 20))  # yellow is nearly as bright as white
    draw_heat(sheet.axes, image, np.zeros((2, 2)), WHOLE, colours=MAGMA, scale=Normalize(0, 1))
    left, right = pixels(sheet)[100, 50].astype(float), pixels(sheet)[100, 150]
    np.testing.assert_allclose(left / right, DARKEST_GREY, atol=0.01)


def test_the_focus_is_outlined_in_black_within_white():
    sheet = Sheet(2, 2)
    draw_image(sheet.axes, Image.new("RGB", (8, 8), (0, 0, 255)), WHOLE)
    outline(sheet.axes, [5], WHOLE, grid=(4, 4))
    shown = pixels(sheet)
    for place in (50, 100):  # left and right edge of the second cell, in its second row
        assert shown[75, place].max() < 60
        assert (shown[75, place - 3 : place + 4].min(axis=1) > 150).any()
    assert shown[75, 75].tolist() == [0, 0, 255] == shown[25, 25].tolist()


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts that share pixels with each other or with a panel, and texts beyond the page."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    sheet, *bars = figure.axes
    texts = [*sheet.texts]
    for bar in bars:
        low, high = bar.get_xlim()
        ticks = zip(bar.get_xticks(), bar.get_xticklabels(), strict=True)
        texts += [label for tick, label in ticks if low <= tick <= high]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    panels = [("panel", panel.get_window_extent(renderer)) for panel in (*sheet.images, *bars)]
    page = figure.bbox
    found = [(name, "page") for name, box in boxes if box.x0 < 0 or box.x1 > page.x1 or box.y0 < 0]
    pairs = [*combinations(boxes, 2), *product(boxes, panels), *combinations(panels, 2)]
    for (name, box), (other, place) in pairs:
        width = min(box.x1, place.x1) - max(box.x0, place.x0)
        height = min(box.y1, place.y1) - max(box.y0, place.y0)
        if width > 1 and height > 3:  # an upper length may touch the line above
            found.append((name, other))
    return found


@pytest.mark.parametrize("with_students", [False, True])
@pytest.mark.parametrize("num_text", [1, 5, 12, 40])
def test_no_text_lies_over_another_or_leaves_the_page(num_text, with_students, inspect):
    seen = longer(inspect("a0"), num_text)
    seen = replace(
        seen, conversations=[{"from": "human", "value": "WWW " * 300}, {"from": "gpt", "value": "W" * 900}]
    )
    drawing = plan_drawing(seen, students(seen) if with_students else {}, max_tokens=40)
    figure = AttentionFigure(seen, drawing).draw()
    assert overlaps(figure) == []
    width, height = figure.get_size_inches()
    assert 8 < width < 22 and height < 1.6 * width


def test_several_images_lie_below_each_other(inspect):
    seen = inspect("apart")
    figure = AttentionFigure(seen, plan_drawing(seen, {}, max_tokens=40)).draw()
    assert overlaps(figure) == []
    titles = [text for text in figure.axes[0].texts if re.fullmatch(r"image \d of 2", text.get_text())]
    assert [t.get_text() for t in titles] == ["image 1 of 2", "image 2 of 2"]
    assert titles[0].get_position()[1] < titles[1].get_position()[1] - 3  # inches down the page


def test_trained_tokens_are_bold(inspect):
    seen = inspect("a0")
    figure = AttentionFigure(seen, plan_drawing(seen, {}, max_tokens=40)).draw()
    weights = {text.get_text(): text.get_weight() for text in figure.axes[0].texts}
    assert weights["␣blue"] == weights["</s>"] == "bold" and weights["␣circle"] == "normal"


def test_characters_without_a_picture_in_the_font_are_spelled_out():
    assert drawable("价 🙂 ␣é\n") == "\\u4ef7 \\U0001f642 ␣é\n"


def test_any_text_can_be_drawn(inspect, tmp_path):
    seen = longer(inspect("a0"), 3, token=" $x^{2 $\\frac 价")
    seen = replace(seen, conversations=[{"from": "human", "value": "costs $5 or $6\n\\ 🙂 {"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of characters that it has no picture of
        draw_attention(seen, tmp_path / "x.png")


# What is written


def test_a_png_and_an_svg_are_written_by_the_ending(inspect, tmp_path):
    seen = inspect("a0")
    draw_attention(seen, tmp_path / "new" / "a.png", students=students(seen))
    draw_attention(seen, tmp_path / "new" / "a.svg", students=students(seen))
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG" and min(image.size) > 1000
    assert ElementTree.parse(tmp_path / "new" / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_same_sample_gives_the_same_bytes(name, inspect, tmp_path):
    for folder in ("one", "two"):
        draw_attention(inspect("a0"), tmp_path / folder / name)
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_sample_of_text_alone_cannot_be_drawn(inspect, tmp_path):
    with pytest.raises(
        PipelineError, match=r"sample 't0' of .* is text alone, no image to look at; name a sample"
    ):
        draw_attention(inspect("t0"), tmp_path / "x.png")


def test_an_image_of_several_tiles_cannot_be_drawn(inspect, tmp_path):
    seen = replace(inspect("two"), grids=((2, 2), (0, 0)))
    with pytest.raises(PipelineError, match=r"its image 2 are several tiles, which no one grid shows"):
        draw_attention(seen, tmp_path / "x.png")


def test_an_outline_follows_a_grid_that_is_wider_than_high():
    sheet = Sheet(2, 2)
    outline(sheet.axes, [5], WHOLE, grid=(2, 4))  # the second row's second cell
    shown = pixels(sheet)
    assert shown[150, 50].max() < 60 > shown[150, 100].max() and shown[150, 75].min() == 255
    assert shown[50].min() == 255


def test_a_store_without_attention_cannot_be_drawn(experiment, tmp_path):
    overrides = ["targets.attention=null", "losses.attention=null", "losses.vision_focus=null"]
    cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store", *overrides))
    with pytest.raises(
        PipelineError,
        match=r"store keeps none of its teacher's attention; cache .* `targets.attention: \{\}`",
    ):
        draw_attention(inspect_sample(tmp_path / "store", "a0"), tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.jpg", "x"])
def test_another_kind_of_picture_is_refused(name, inspect, tmp_path):
    with pytest.raises(
        PipelineError, match=rf"{name}: a picture can be written as .png or .svg, the name ends in '"
    ):
        draw_attention(inspect("a0"), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_no_token_at_all_is_refused(inspect, tmp_path):
    with pytest.raises(
        PipelineError, match=r"max_tokens: expected a number of text tokens from 1 on, found 0"
    ):
        draw_attention(inspect("a0"), Path(tmp_path / "x.png"), max_tokens=0)
