"""Evaluation of twigs: accuracy kept, its intervals and files, pictures, operations."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import tiny_model

from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.predictions import Prediction
from pipeline.twig.base import Base
from pipeline.twig.decoding.generate import Answers
from pipeline.twig.evaluation.asking import spread
from pipeline.twig.evaluation.curves import COLOURS, look_of, percent
from pipeline.twig.evaluation.kept import SETTINGS, WHOLE, Pruned, open_folder
from pipeline.twig.evaluation.operations import Operations
from pipeline.twig.evaluation.pictures import DARK, dimmed
from pipeline.twig.evaluation.result import KeptRow
from pipeline.twig.evaluation.scoring import kept_rows, kinds_of
from pipeline.twig.evaluation.shares import parse_shares
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

HALF, THIRD = Fraction(1, 2), Fraction(1, 3)
LONG_TEXT = "a red picture with two things. in it sits a fox."


# Accuracy kept, by hand


def predictions(colours: Sequence[str], texts: Sequence[str]) -> list[Prediction]:
    """Answers about images 0, 1, ...: all colours are red, all texts `LONG_TEXT`."""
    made = [Prediction(f"{n}c", f"{n}", "colour", "red", said) for n, said in enumerate(colours)]
    return made + [Prediction(f"{n}d", f"{n}", "describe", LONG_TEXT, said) for n, said in enumerate(texts)]


WHOLE_ANSWERS = predictions(["red", "red", "red", "blue"], [LONG_TEXT, LONG_TEXT, LONG_TEXT, ""])
PRUNED_ANSWERS = predictions(["red", "blue", "red", "blue"], [LONG_TEXT, "a fox.", "in it sits a fox.", ""])


def row_of(rows: Sequence[KeptRow], kind: str, selector: str) -> KeptRow:
    (found,) = [row for row in rows if (row.kind, row.selector) == (kind, selector)]
    return found


def test_short_answers_are_right_or_wrong_and_long_ones_are_right_by_sentence():
    assert kinds_of(WHOLE_ANSWERS) == {"colour": "short", "describe": "long"}
    rows = kept_rows(WHOLE_ANSWERS, {Pruned("random", HALF): PRUNED_ANSWERS})
    assert [row.kind for row in rows] == ["short", "long", "colour", "describe"]
    short, long = row_of(rows, "short", "random"), row_of(rows, "long", "random")
    assert (short.whole, short.score, short.questions, short.images) == (0.75, 0.5, 4, 4)
    assert (long.whole, long.score) == (0.75, 0.375)  # of two sentences a right one: two, none, one, none
    assert short.kept and short.kept.value == pytest.approx(2 / 3) and short.by_twig == [pytest.approx(2 / 3)]
    assert long.kept and long.kept.value == pytest.approx(0.5)
    assert short.kept.low < 2 / 3 < short.kept.high <= 1
    assert row_of(rows, "colour", "random").kept == short.kept


def test_nothing_lost_is_kept_whole():
    (row, *_) = kept_rows(WHOLE_ANSWERS, {Pruned("random", HALF): WHOLE_ANSWERS})
    assert row.kept and (row.kept.low, row.kept.value, row.kept.high) == (1, 1, 1)


def test_a_base_that_answers_nothing_keeps_nothing_that_could_be_said():
    nothing = predictions(["blue"] * 4, [""] * 4)
    rows = kept_rows(nothing, {Pruned("twig", HALF, "a"): nothing, Pruned("random", HALF): nothing})
    assert all(row.kept is None and row.beside_twig is None and row.by_twig == [] for row in rows)


def test_other_selectors_are_compared_with_the_twig_on_the_same_images():
    runs = {Pruned("twig", HALF, "a"): PRUNED_ANSWERS, Pruned("random", HALF): WHOLE_ANSWERS}
    rows = kept_rows(WHOLE_ANSWERS, runs)
    beside = row_of(rows, "short", "random").beside_twig
    assert beside and beside.value == pytest.approx(1 / 3) and 0 <= beside.low < 1 / 3 < beside.high
    assert row_of(rows, "short", "twig").beside_twig is None
    same = kept_rows(WHOLE_ANSWERS, runs | {Pruned("random", HALF): PRUNED_ANSWERS})
    beside = row_of(same, "short", "random").beside_twig
    assert beside and (beside.low, beside.value, beside.high) == (0, 0, 0)


def test_several_twigs_have_a_mean_and_students_t():
    two = {Pruned("twig", HALF, "a"): PRUNED_ANSWERS, Pruned("twig", HALF, "b"): WHOLE_ANSWERS}
    kept = row_of(kept_rows(WHOLE_ANSWERS, two), "short", "twig")
    assert kept.by_twig == [pytest.approx(2 / 3), pytest.approx(1)]
    assert kept.kept and kept.kept.value == pytest.approx(5 / 6)
    assert kept.kept.high > 1  # with one degree of freedom, two seeds say little
    equal = {Pruned("twig", HALF, name): WHOLE_ANSWERS for name in "ab"}
    assert (
        row_of(kept_rows(WHOLE_ANSWERS, equal), "short", "twig").kept
        == kept_rows(WHOLE_ANSWERS, {Pruned("random", HALF): WHOLE_ANSWERS})[0].kept
    )


def test_answers_to_other_questions_are_no_comparison():
    with pytest.raises(PipelineError, match="answered different questions"):
        kept_rows(WHOLE_ANSWERS, {Pruned("random", HALF): PRUNED_ANSWERS[1:]})


# Names, shares, folders


def test_a_file_is_named_by_selector_twig_and_share():
    assert Pruned("fastv+T (layer 2)", THIRD).file == "fastv+T-layer-2_1-3.jsonl"
    assert Pruned("twig", THIRD, "ab" * 32).file == "twig_abababababab_1-3.jsonl"
    assert Pruned(WHOLE).file == "no-pruning.jsonl"


def test_shares_are_fractions():
    assert parse_shares("1/3, 0.1,1/3") == [Fraction(1, 3), Fraction(1, 10)]
    for text, complaint in (
        ("a", "found 'a'"),
        ("1/0", "found '1/0'"),
        ("2", "found '2'"),
        (",", "no share"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            parse_shares(text)


def test_a_folder_of_other_settings_is_refused_until_it_is_overwritten(tmp_path):
    folder = tmp_path / "predictions"
    open_folder(folder, {"base": "a", "limit": None}, overwrite=False)
    (folder / "twig.jsonl").touch()
    open_folder(folder, {"base": "a", "limit": None}, overwrite=False)
    with pytest.raises(
        ConfigError, match=r"made with another base and limit than is asked for; add --overwrite"
    ):
        open_folder(folder, {"base": "b", "limit": 3}, overwrite=False)
    open_folder(folder, {"base": "b", "limit": 3}, overwrite=True)
    assert [file.name for file in folder.iterdir()] == [SETTINGS]
    (folder / SETTINGS).write_text("{")
    with pytest.raises(PipelineError, match="is damaged"):
        open_folder(folder, {}, overwrite=False)


def test_what_is_chosen_is_spread_evenly():
    assert (
        spread(range(9), 3) == [0, 4, 8] and spread(range(3), 5) == [0, 1, 2] and spread(range(9), 1) == [0]
    )


# Pictures and operations


def test_cells_that_go_are_dark():
    image = Image.fromarray(np.full((6, 6, 3), 200, np.uint8))
    seen = np.asarray(dimmed(image, np.array([[True, False], [False, True]])))
    assert (seen[:3, :3] == 200).all() and (seen[3:, 3:] == 200).all()
    assert (seen[:3, 3:] == int(200 * DARK)).all() and (seen[3:, :3] == int(200 * DARK)).all()


def test_lines_of_a_picture_look_unlike_each_other_though_the_colours_are_used_up():
    looks = [tuple(look_of(number, COLOURS).values()) for number in range(3 * len(COLOURS))]
    assert len(set(looks)) == len(looks)


def test_ticks_of_half_a_percent_are_told_apart():
    assert [percent(share, None) for share in (0.985, 0.99, 1.0, 0.07)] == ["98.5%", "99%", "100%", "7%"]


def test_operations_are_positions_times_parameters():
    base = Base.of(tiny_model(num_hidden_layers=6))
    twig = Twig.copied(base.network, Geometry(1, 2, 5, 6))
    of_layer = sum(p.numel() for p in base.layers[0].parameters())
    head = sum(p.numel() for p in base.head.parameters())
    rows = {"shallow": 10, "middle": 4 * 7, "deep": 5, "own": 2 * 10, "head": 5, "own_head": 3}
    answers = Answers([[1, 2]], drafted=[3], accepted=[1], passes=[2], rows=rows)
    assert Operations.of(base, twig).of_answers(answers) == of_layer * 63 + head * (3 + 2 + 3)
    alone = Answers([[1, 2]], [0], [0], [2], {"shallow": 0, "middle": 60, "deep": 0, "head": 2})
    assert Operations.of(base, None).of_answers(alone) == of_layer * 60 + head * 2
    twig.shorten(torch.arange(5))
    assert Operations.of(base, twig).of_answers(answers) == of_layer * 63 + head * 5 + 3 * 5 * 32
