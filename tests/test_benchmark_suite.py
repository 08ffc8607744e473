"""The suite of benchmarks: prompts, answers that are kept and continued, scores, averages, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import HUB, OFFICIAL, lines, put, write_all, write_gqa
from small_experiment import picture
from tiny_families import write_checkpoint

import cli
from pipeline.benchmarks import run
from pipeline.benchmarks.answering import Answerer, HowToAsk, prompt_of
from pipeline.benchmarks.answers_file import AnswersFile
from pipeline.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from pipeline.benchmarks.places import ImageFile
from pipeline.benchmarks.run import measure, read_suite, sample_of
from pipeline.benchmarks.scores import AVERAGED, SuiteScores
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.data.conversation import tokenize_prompt
from pipeline.data.images import ImagePreprocessor
from pipeline.data.template_preparation import TemplatePreparation
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent


def short(name: str, tokens: int = 3) -> Benchmark:
    """Return a benchmark whose answers are short."""
    return replace(BENCHMARKS[name], max_new_tokens=tokens)


def question(name: str, text: str = "Is it?", **fields) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        name, text, ImageFile(Path("none")), fields.pop("image_id", name), "yes", **fields
    )


@pytest.fixture
def briefly(monkeypatch):
    """Answers of three tokens: what is long of ScienceQA and MMBench is no part of these tests."""
    for name in BENCHMARKS:
        monkeypatch.setitem(BENCHMARKS, name, short(name))


@pytest.fixture
def small_splits(briefly, monkeypatch):
    """Takes the splits of `write_all` for the published ones."""
    sizes = {"gqa": 3, "scienceqa": 2, "textvqa": 3, "textvqa-no-ocr": 3, "pope": 6, "mme": 20, "mmbench": 5}
    for name, size in sizes.items():
        monkeypatch.setitem(BENCHMARKS, name, replace(BENCHMARKS[name], num_questions=(size,)))


@pytest.fixture
def alignkd(capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return execute


# Prompts


def test_mobilevlm_gets_the_ids_of_the_originals_prompt(fixture_folder, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    images = ImagePreprocessor.from_pretrained(fixture_folder, aspect_ratio="pad", image_size=336)
    preparation = TemplatePreparation.with_images(
        images, DataConfig(shards="none"), tokenizer=tokenizer, num_vision_tokens=1
    )
    case = json.loads((fixture_folder / "tokenization.json").read_text())["cases"]["v1/single_turn"]
    prompt_length = next(n for n, label in enumerate(case["labels"]) if label != -100)
    expected = [IMAGE_TOKEN_ID if n == -200 else n for n in case["input_ids"][:prompt_length]]
    asked = prompt_of(preparation, question("a", "What colour is the bus?"), picture(0))
    assert list(asked.input_ids) == expected
    suffix = "Is it red?\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": f"<image>\n{suffix}"}]
    ids = prompt_of(preparation, question("a", suffix), picture(0)).input_ids
    assert list(ids) == tokenize_prompt(turns, tokenizer, template="v1")
    assert tokenizer.decode(ids[-14:]).endswith("single word or phrase. ASSISTANT:")


def test_scienceqa_is_cropped_and_the_others_are_padded(experiment):
    answerer = Answerer(str(experiment.student), HowToAsk())
    wide = picture(3, size=(90, 30))
    padded = answerer.preparation(BENCHMARKS["gqa"]).preprocess(wide)["pixel_values"]
    cropped = answerer.preparation(BENCHMARKS["scienceqa"]).preprocess(wide)["pixel_values"]
    assert torch.unique(padded[0, 0, 0]).numel() == 1  # the padding above the image
    assert torch.unique(cropped[0, 0, 0]).numel() > 1
    identities = [
        answerer.identity(b, answerer.preparation(b)) for b in (BENCHMARKS["gqa"], BENCHMARKS["scienceqa"])
    ]
    assert identities[0]["image_preprocessing"] != identities[1]["image_preprocessing"]


def asked_of(model: Path, data: Path, name: str, batch_size: int) -> list[str]:
    """Return a model's answers to a benchmark, in batches of this size."""
    answerer = Answerer(str(model), HowToAsk())
    folder = BENCHMARKS[name].folder(data)
    assert folder is not None
    questions = BENCHMARKS[name].read(folder)
    answerer.how = HowToAsk(evaluate=EvaluateConfig(shards="none", batch_size=batch_size))
    batches = answerer.answers(short(name, 8), answerer.preparation(BENCHMARKS[name]), questions)
    return [answer for _, answers in batches for answer in answers]


def test_answers_do_not_depend_on_the_batch_and_are_those_of_greedy_decoding(experiment, tmp_path):
    write_all(tmp_path)
    alone = asked_of(experiment.student, tmp_path, "textvqa", 1)
    assert asked_of(experiment.student, tmp_path, "textvqa", 3) == alone
    answerer = Answerer(str(experiment.student), HowToAsk())
    preparation = answerer.preparation(BENCHMARKS["textvqa"])
    model = MobileVLMForCausalLM.from_pretrained(experiment.student, dtype=torch.float32).eval()
    for one, answer in zip(BENCHMARKS["textvqa"].read(tmp_path / "textvqa"), alone, strict=True):
        ids = list(prompt_of(preparation, one, one.image.read()).input_ids)
        pixels, said = preparation.preprocess(one.image.read())["pixel_values"], []
        for _ in range(8):
            with torch.no_grad():
                said.append(
                    int(model(torch.tensor([ids + said]), pixel_values=pixels).logits[0, -1].argmax())
                )
            if said[-1] == preparation.tokenizer.eos_token_id:
                break
        assert preparation.tokenizer.decode(said, skip_special_tokens=True).strip() == answer


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_model_of_another_family_answers_by_its_own_chat_template(family, tmp_path):
    write_gqa(tmp_path)
    model = write_checkpoint(family, tmp_path / "model", seed=1)
    assert asked_of(model, tmp_path, "gqa", 1) == asked_of(model, tmp_path, "gqa", 3)


# Answers that are kept


IDENTITY = {"benchmark": "gqa", "weights": "w", "version": 1}


def test_answers_are_continued(tmp_path):
    questions = [question("a"), question("b"), question("c")]
    with AnswersFile(tmp_path / "x" / "gqa.jsonl", IDENTITY) as file:
        file.add(questions[:2], ["yes", "né\nb"])
    with AnswersFile(tmp_path / "x" / "gqa.jsonl", IDENTITY) as file:
        assert file.known(questions) == {"a": "yes", "b": "né\nb"}
        file.add(questions[2:], ["no"])
    with AnswersFile(tmp_path / "x" / "gqa.jsonl", IDENTITY) as file:
        assert file.known(questions) == {"a": "yes", "b": "né\nb", "c": "no"}


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_last_line_that_was_cut_off_is_asked_again(cut, tmp_path):
    file, questions = tmp_path / "gqa.jsonl", [question("a"), question("b")]
    with AnswersFile(file, IDENTITY) as answers:
        answers.add(questions, ["yes", "no"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with AnswersFile(file, IDENTITY) as answers:
        assert answers.known(questions) == {"a": "yes"}
        answers.add(questions[1:], ["no"])
    assert file.read_bytes() == whole


def test_a_first_line_that_was_cut_off_is_written_again(tmp_path):
    file = put(tmp_path / "gqa.jsonl", '{"benchm')
    with AnswersFile(file, IDENTITY) as answers:
        assert answers.known([question("a")]) == {}
    assert json.loads(file.read_text()) == IDENTITY


@pytest.mark.parametrize("field", IDENTITY)
def test_answers_of_another_model_or_prompt_are_refused(field, tmp_path):
    file = tmp_path / "gqa.jsonl"
    with AnswersFile(file, IDENTITY) as answers:
        answers.add([question("a")], ["yes"])
    before = file.read_bytes()
    with pytest.raises(
        PipelineError, match=rf"answers with another {field}: .*now 'other'; give another --output"
    ):
        AnswersFile(file, IDENTITY | {field: "other"})
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["[1]\n[2]\n", '{"benchmark": "gqa"}\nno\n', '{"a": 1}\n{"id": "a"}\n', "\n"]
)
def test_a_damaged_file_of_answers_is_refused(content, tmp_path):
    file = put(tmp_path / "gqa.jsonl", content)
    with pytest.raises(PipelineError, match=r"gqa.jsonl (is damaged|holds answers with another)"):
        AnswersFile(file, IDENTITY)


@pytest.mark.parametrize("changed", [{"text": "Was it?"}, {"image_id": "other"}, {"group": "other"}])
def test_an_answer_to_a_question_that_changed_is_refused(changed, tmp_path):
    with AnswersFile(tmp_path / "gqa.jsonl", IDENTITY) as file:
        file.add([question("a")], ["yes"])
        with pytest.raises(PipelineError, match="question a was another when it was answered"):
            file.known([question("a", **changed)])


def test_two_runs_do_not_write_one_file(tmp_path):
    file = tmp_path / "gqa.jsonl"
    with AnswersFile(file, IDENTITY), pytest.raises(PipelineError, match="another run writes it"):
        AnswersFile(file, IDENTITY)
    with AnswersFile(file, IDENTITY) as answers:
        assert answers.known([question("a")]) == {}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "gqa.jsonl").mkdir()
    with pytest.raises(PipelineError, match=r"gqa.jsonl: cannot be written"):
        AnswersFile(tmp_path / "gqa.jsonl", IDENTITY)


def test_a_rerun_asks_nothing_and_a_larger_one_the_rest(experiment, tmp_path, briefly, monkeypatch):
    write_gqa(tmp_path)
    asked: list[int] = []
    whole = Answerer.answers

    def counting(self, benchmark, preparation, questions):
        asked.append(len(questions))
        return whole(self, benchmark, preparation, questions)

    monkeypatch.setattr(Answerer, "answers", counting)

    def measured(limit: int | None) -> SuiteScores:
        suite = read_suite(tmp_path, [BENCHMARKS["gqa"]], limit=limit, must_all=True, say=print)
        return measure(str(experiment.student), suite, HowToAsk(), output=tmp_path / "out")

    first, second, third = measured(2), measured(None), measured(None)
    assert asked == [2, 1, 0]
    assert first.scores["gqa"].is_sample and not second.scores["gqa"].is_sample
    assert second.scores["gqa"].measures == third.scores["gqa"].measures


KILLED = """
import os, signal, sys
from pipeline.benchmarks import answers_file
add = answers_file.AnswersFile.add
def adding(self, questions, answers):
    add(self, questions, answers)
    os.kill(os.getpid(), signal.{signal})
answers_file.AnswersFile.add = adding
import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGINT", 130)])
def test_a_run_that_was_stopped_is_continued(name, code, experiment, tmp_path, alignkd):
    write_gqa(tmp_path)
    line = ["evaluate", "--config", experiment.file, f"output_dir={tmp_path}/run", "evaluate.batch_size=1"]
    line += ["--suite", "align-kd", "--data", tmp_path, "--only", "gqa", "--model", experiment.student]
    line += ["--output", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED.replace("{signal}", name), *map(str, line)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ran.returncode == code, ran.stderr
    if name == "SIGINT":
        assert "interrupted; the answers so far are in" in ran.stderr and "Traceback" not in ran.stderr
    [file] = (tmp_path / "out").rglob("gqa.jsonl")
    left = file.read_text()
    assert len(left.splitlines()) == 2
    assert alignkd(*line)[0] == 0
    assert file.read_text().startswith(left) and len(file.read_text().splitlines()) == 4


# Samples


def test_a_sample_holds_whole_units_of_each_group_whatever_their_order():
    questions = [
        question(f"{group}{unit}{n}", group=group, unit=f"{group}{unit}")
        for group in "xyz"
        for unit in range(20)
        for n in range(2)
    ]
    sample = sample_of(questions, 7)
    assert len(sample) == 8 and [q for q in questions if q in sample] == list(sample)
    assert {q.group for q in sample} == {"x", "y", "z"}
    assert all(sum(q.unit == other.unit for q in sample) == 2 for other in sample)
    assert {q.id for q in sample_of(questions[::-1], 7)} == {q.id for q in sample}
    assert sample_of(questions, 120) is questions and sample_of(questions, None) is questions


# The command line


def test_the_suite_prints_the_papers_table_for_two_models(experiment, tmp_path, small_splits, alignkd):
    write_all(tmp_path)
    line = ["evaluate", "--suite", "align-kd", "--data", tmp_path, "--output", tmp_path / "out"]
    line += ["--model", experiment.teacher, "--model", experiment.student]
    code, out, _ = alignkd(*line)
    assert code == 0
    head, _, first, second, *_ = out.splitlines()
    assert head.split() == ["GQA", "SQA-I", "TextVQA", "POPE", "MME-P", "MMB-dev", "Avg"]
    assert first.startswith("teacher ") and second.startswith("student ")
    for words in (
        "published: 1.7B, Short, Align-KD 58.9 66.6 52.4 86.5 1288.4 57.8 64.4",
        "teacher minus student",
        "TextVQA, no OCR",
        "Align-KD (CVPR 2025)",
        "Avg mean of the six, MME / 20",
    ):
        assert words in " ".join(out.split()), out
    found = json.loads(alignkd(*line, "--json")[1])
    teacher = found["models"][str(experiment.teacher)]
    six = [teacher["benchmarks"][row.name]["value"] / row.average_divisor for row in AVERAGED]
    assert teacher["average"]["value"] == pytest.approx(np.mean(six))
    assert found["missing"] == [] and list(found["first_minus_second"])[-1] == "average"
    assert float(first.split()[-1]) == pytest.approx(teacher["average"]["value"], abs=0.051)


def test_the_answers_of_the_suite_are_scored_as_they_stand_in_the_file(
    experiment, tmp_path, small_splits, alignkd
):
    """Right answers put into the files by hand give full scores: 100 each, and MME 2000."""
    write_all(tmp_path)
    line = ["evaluate", "--suite", "align-kd", "--data", tmp_path, "--output", tmp_path / "out"]
    line += ["--model", experiment.student, "--json"]
    assert alignkd(*line)[0] == 0
    for file in (tmp_path / "out").rglob("*.jsonl"):
        benchmark = BENCHMARKS[file.stem]
        folder = benchmark.folder(tmp_path)
        assert folder is not None
        right = {
            q.id: q.reference if isinstance(q.reference, str) else q.reference[0]
            for q in benchmark.read(folder)
        }
        head, *rows = map(json.loads, file.read_text().splitlines())
        file.write_text(lines([head, *(row | {"answer": right[row["id"]]} for row in rows)]))
    found = json.loads(alignkd(*line)[1])["models"][str(experiment.student)]
    values = {name: score["value"] for name, score in found["benchmarks"].items()}
    assert values == dict.fromkeys(BENCHMARKS, 100.0) | {"mme": 2000.0}
    assert found["average"]["value"] == found["average"]["high"] == 100.0


def test_some_benchmarks_a_sample_and_a_config(experiment, tmp_path, briefly, alignkd):
    HUB["pope"](tmp_path)
    line = ["evaluate", "--config", experiment.file, f"output_dir={tmp_path}/run", "--suite", "align-kd"]
    line += ["--data", tmp_path, "--limit", "3"]
    code, out, err = alignkd(*line)  # of the config's teacher
    assert code == 0 and "sample of 3 from 6" in out and "* not all questions of the published split" in out
    assert "missing: GQA, SQA-I, TextVQA, MME-P, MMB-dev, POPE (a sample)" in out
    assert f"GQA: no folder {tmp_path}/gqa; put testdev_balanced_questions.json" in err
    [file] = (tmp_path / "run" / "benchmarks").rglob("pope.jsonl")
    assert len(file.read_text().splitlines()) == 4


WRONG = {
    "--data": (["--suite", "align-kd"], "--suite needs --data"),
    "a suite": (["--data", ".", "--model", "m"], "--data belongs to --suite"),
    "a config": (["--model", "m"], "Missing option '--config'"),
    "a model": (["--suite", "align-kd", "--data", "."], "--suite needs one --model"),
    "two models": (["--suite", "align-kd", "--data", ".", *["--model", "m"] * 2], "two different ones"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_command_line_that_lacks_something_says_what(what, alignkd):
    arguments, message = WRONG[what]
    code, out, err = alignkd("evaluate", *arguments)
    assert (code, out) == (2, "") and message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "align"], "--suite: unknown name 'align'; did you mean 'align-kd'?"),
        (
            ["--suite", "align-kd", "--only", "gqa,popee"],
            "--only: unknown benchmark 'popee'; did you mean 'pope'?",
        ),
        (["--suite", "align-kd", "--only", "mme, gqa"], "GQA: no folder"),
        (["--suite", "align-kd", "--only", "mme"], "MME-P: no folder"),
        (["--suite", "align-kd"], "holds no benchmark; docs/benchmarks.md says where to get them"),
    ],
)
def test_what_is_not_there_is_named(arguments, message, alignkd, tmp_path):
    code, out, err = alignkd("evaluate", *arguments, "--data", tmp_path, "--model", "m")
    assert (code, out) == (2, "") and message in err


def test_an_image_that_is_damaged_is_named(experiment, tmp_path, briefly, alignkd):
    folder = OFFICIAL["gqa"](tmp_path)
    put(folder / "images" / "n2.jpg", b"no image")
    line = [
        "evaluate",
        "--suite",
        "align-kd",
        "--data",
        tmp_path,
        "--output",
        tmp_path / "out",
        "--only",
        "gqa",
    ]
    code, _, err = alignkd(*line, "--model", experiment.student)
    assert code == 1 and "not an image" in err and "n2" in err


def test_questions_with_one_name_are_refused(tmp_path, monkeypatch):
    write_gqa(tmp_path)
    twice = replace(BENCHMARKS["gqa"], read=lambda folder: [question("a"), question("a")])
    with pytest.raises(PipelineError, match="2 questions are called 'a'"):
        read_suite(tmp_path, [twice], limit=None, must_all=True, say=print)
    placed = replace(twice, read=lambda folder: [question("a", "Is <image> here?")])
    with pytest.raises(PipelineError, match="the text of question a holds <image>"):
        read_suite(tmp_path, [placed], limit=None, must_all=True, say=print)
    none = replace(twice, read=lambda folder: [])
    with pytest.raises(PipelineError, match="hold no question"):
        read_suite(tmp_path, [none], limit=None, must_all=True, say=print)
    with pytest.raises(ConfigError, match="holds no benchmark"):
        run.read_suite(tmp_path / "other", [twice], limit=None, must_all=False, say=print)
