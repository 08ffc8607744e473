"""bench-model: what is measured, how it is counted, and what it shows; and an object in a process of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sweep import write_sweep, write_timed_store

import cli
from pipeline.errors import PipelineError
from pipeline.evaluation.predictions import Prediction
from pipeline.export.executorch.packages import is_installed
from pipeline.export.served import Served
from pipeline.phone.answers import Shown, draw_answers, question_text
from pipeline.phone.bench import _row
from pipeline.phone.contestants import Contestant
from pipeline.phone.energy import EnergyMeter
from pipeline.phone.picture import draw_bench
from pipeline.phone.result import RESULT, BenchResult, Row
from pipeline.phone.runners import Timed
from pipeline.ratios import Ratios
from pipeline.report.gather import PHONE_FOLDER
from pipeline.report.page import write_report


def row(name: str, **changes) -> Row:
    fields = {
        "name": name,
        "eyes": "its own",
        "bytes": 10_000_000,
        "memory": 20_000_000,
        "image": 0.01,
        "first_token": 0.03,
        "tokens_a_second": 50.0,
        "first_token_ratio": None,
        "tokens_ratio": None,
        "joules": None,
        "accuracy": 0.9,
        "same_answers": 1.0,
        "difference": None,
    }
    return Row(**fields | changes)


def result() -> BenchResult:
    small = row(
        "llama.cpp q4_k_m", bytes=2_000_000, eyes="ExecuTorch's", accuracy=0.88, difference=(-0.02, -0.05, 0.01),
        first_token_ratio=Ratios(0.5, 0.4, 0.7), tokens_ratio=Ratios(3.0, 2.0, 4.5),
    )  # fmt: skip
    return BenchResult([row("PyTorch float32"), small], "student", "ab" * 32, 300, 20, 32, 2, "x86_64, Linux")


# Numbers


def test_a_ratio_is_of_turns_and_not_of_medians():
    # The machine was slow in the second turn for both: the ratio of each turn is 2.
    assert Ratios.of([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Ratios(2.0, 2.0, 2.0)
    assert str(Ratios.of([1.0, 3.0, 2.0], [1.0, 1.0, 1.0])) == "2.00 [1.00, 3.00]"


def test_the_first_token_has_waited_for_the_image_and_the_prompt():
    timed = Timed((5, 6, 7), image=0.25, prompt=0.5, answer=0.1)
    assert timed.first_token == 0.75 and timed.tokens_a_second == pytest.approx(20)


def test_the_table_says_what_each_costs_and_how_it_was_measured():
    shown = str(result())
    assert "llama.cpp q4_k_m, ExecuTorch's eyes" in shown and "-2.00 [-5.00, +1.00]" in shown
    assert "3.00 [2.00, 4.50]" in shown and "energy: this machine does not say" in shown
    assert "accuracy of 300 questions" in shown and "20 turns" in shown


def test_a_result_is_read_as_it_was_written_and_damage_is_named(tmp_path):
    file = result().write(tmp_path)
    assert BenchResult.read(file) == result()
    file.write_text(file.read_text()[:-40])
    with pytest.raises(PipelineError, match=r"bench-model.json is damaged; run `alignkd bench-model` again"):
        BenchResult.read(file)


def test_energy_is_counted_over_the_end_of_the_counter_and_absent_without_one(tmp_path):
    assert EnergyMeter(tmp_path).joules() is None
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("900")
    (zone / "max_energy_range_uj").write_text("1000")
    meter = EnergyMeter(tmp_path)
    (zone / "energy_uj").write_text("2000900")
    assert meter.joules() == pytest.approx(2.0)
    (zone / "energy_uj").write_text("400")  # it began again
    assert meter.joules() == pytest.approx((400 - 2_000_900 + 1000) / 1e6)


def test_the_time_of_an_image_is_that_of_questions_that_have_one():
    timed = [Timed((1, 2), image, 0.1, 0.1) for image in (0.0, 0.0, 0.0, 0.4, 0.6)]
    contestant = Contestant("PyTorch", 1, list, ())
    answer = Prediction("0", "image", "", "red", "red")
    assert _row(contestant, 1, timed, [], [answer], timed, [answer]).image == 0.5
    without = [Timed((1, 2), 0.0, 0.1, 0.1)]
    assert _row(contestant, 1, without, [], [answer], without, [answer]).image == 0


# Pictures


def test_the_plot_and_the_answers_are_drawn(tmp_path):
    draw_bench(result(), tmp_path / "plot.png", tmp_path / "plot.svg")
    assert "llama.cpp q4_k_m" in (tmp_path / "plot.svg").read_text()
    picture = np.zeros((8, 8, 3), np.uint8)
    same = Shown("What colour?", picture, "red", {"PyTorch": "red", "q4": "red"})
    other = Shown("What shape?", None, "circle", {"PyTorch": "circle", "q4": "square"})
    assert other.differs and not same.differs
    draw_answers([same, other], tmp_path / "answers.png")
    assert Image.open(tmp_path / "answers.png").size[0] > 1000


def test_the_question_is_the_last_of_a_prompt():
    prompt = "A chat. USER: What is it? ASSISTANT: A cat.</s>USER: \nWhy? ASSISTANT:"
    assert question_text(prompt) == "Why?"
    assert question_text("another template") == "another template"


# A process of its own


class Parrot:
    """Repeats a word, or ends its process."""

    def __init__(self, word: str) -> None:
        if word == "never":
            raise PipelineError("it never was")
        self.word, self.held = word, b""

    def say(self, times: int) -> str:
        return self.word * times

    def hold(self, size: int) -> int:
        self.held = b"x" * size
        return len(self.held)

    def end(self) -> None:
        os.write(2, b"the last words\n")
        os._exit(3)


@pytest.mark.slow
def test_an_object_answers_from_its_process_and_its_memory_is_its_own():
    with Served(Parrot, "ha", what="parrot") as parrot:
        assert parrot.call("say", 3) == "hahaha"
        before = parrot.model_bytes()
        parrot.call("hold", 50_000_000)
        assert 45_000_000 < parrot.model_bytes() - before < 120_000_000


@pytest.mark.slow
def test_what_ends_the_process_or_is_raised_in_it_is_one_sentence():
    with pytest.raises(PipelineError, match="parrot ended with code 3; its last words: the last words"):  # noqa: SIM117
        with Served(Parrot, "ha", what="parrot") as parrot:
            parrot.call("end")
    with pytest.raises(PipelineError, match="it never was"):
        Served(Parrot, "never", what="parrot")


# The command


def test_without_a_student_it_says_how_to_get_one(experiment_like, capsys):
    config, _ = experiment_like
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench-model", "--config", str(config)])
    told = capsys.readouterr().err
    assert "align_kd: no student yet; train it with `alignkd distill`, or name one by --model" in told


@pytest.fixture(scope="module")
def experiment_like(tmp_path_factory) -> tuple[Path, Path]:
    """A config with held-out questions, and a random model whose tower llama.cpp takes."""
    from phone_models import write_phone_model, write_pictures

    folder = tmp_path_factory.mktemp("bench")
    pictures = write_pictures(folder / "pictures", number=6)
    records = [
        {
            "id": str(number),
            "image": f"{number:02}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": "red"},
            ],
        }
        for number in range(6)
    ]
    (folder / "test.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["pack", str(folder / "test.json"), str(folder / "shards"), "--image-folder", str(pictures)])
    model = write_phone_model(folder / "model")
    config = folder / "config.yaml"
    config.write_text(
        f"teacher: {{model: {model}}}\nstudent: {{model: {model}}}\n"
        f"data: {{shards: {folder}/shards, template: v1}}\ncache: {{path: {folder}/store}}\n"
        f"targets: {{logits: {{}}}}\nlosses: {{supervised: {{}}, logits: {{}}}}\noutput_dir: {folder}/out\n"
        f"evaluate: {{shards: {folder}/shards, max_new_tokens: 4}}\n"
    )
    return config, model


@pytest.mark.slow
def test_every_runtime_answers_the_same_questions(experiment_like, capsys):
    config, model = experiment_like
    command = [
        "bench-model",
        "--config",
        str(config),
        "--model",
        str(model),
        "--turns",
        "2",
        "--new-tokens",
        "4",
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--quants", "f16", "--threads", "1"])
    shown = capsys.readouterr()
    folder = config.parent / "out" / PHONE_FOLDER
    made = BenchResult.read(folder / RESULT)
    names = ["PyTorch float32", "llama.cpp f16", *(["ExecuTorch"] if is_installed() else [])]
    assert [one.name for one in made.rows] == names and made.questions == 6 and made.turns == 2
    assert all(one.memory > 0 and one.tokens_a_second > 0 and one.image > 0 for one in made.rows)
    assert made.rows[1].eyes == "its own" and "computes CLIP wrongly" in shown.err
    assert made.rows[-1].same_answers == 1 or not is_installed()  # float32 on both sides
    assert all((folder / name).is_file() for name in ("bench-model.png", "bench-model.svg", "answers.png"))
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--quants", "f16,q3"])
    assert "unknown 'q3'; known are f16, q8_0, q4_k_m" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_shows_what_was_measured(tmp_path):
    folder = write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))
    assert "On a phone" not in write_report(folder).read_text()
    result().write(folder / PHONE_FOLDER)
    page = write_report(folder).read_text()
    assert "On a phone" in page and "ExecuTorch&#39;s eyes" in page and "what do fewer bits cost?" in page
    assert "3.00 [2.00, 4.50]" in page
