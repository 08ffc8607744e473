"""Scores beside accuracy: log probabilities of references, token F1 and ROUGE-L where answers are sentences."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cli
from pipeline.config.config import EvaluateConfig, overridden
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import read_shard
from pipeline.evaluation.answer_scores import (
    Scores,
    metrics_for,
    rouge_l,
    score_table,
    scores_by_type,
    sentence_recall,
    token_f1,
    words,
)
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.evaluation.predictions import Prediction, read_predictions
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.sweep.identity import run_identity


@pytest.fixture
def predictions_of(experiment, tmp_path):
    """Predictions of the experiment's student, by batch size."""

    def predict(batch_size: int = 4, *overrides: str) -> list[Prediction]:
        config = experiment.config(tmp_path, f"evaluate.batch_size={batch_size}", *overrides)
        file = tmp_path / f"{batch_size}.jsonl"
        return evaluate_model(str(experiment.student), config.data, config.evaluate, output=file)

    return predict


# Log probabilities of the references


def test_a_reference_has_the_log_probability_of_a_plain_forward_one_by_one(
    experiment, predictions_of, tmp_path
):
    config = experiment.config(tmp_path)
    preparation = load_preparation(config.student.model, config.data)
    model = MobileVLMForCausalLM.from_pretrained(experiment.student, dtype=torch.float32).eval()
    shards = sorted(experiment.held_out.glob("*.tar"))
    samples = {sample.key: sample for shard in shards for sample in read_shard(shard)}
    found = {p.key: p for p in predictions_of()}
    assert found.keys() == samples.keys()
    for key, sample in samples.items():
        tokens = preparation.tokenize(sample.conversations)  # of one turn, so all labels are of the reference
        pixels = [preparation.preprocess(image)["pixel_values"] for image in sample.images]
        ids, labels = torch.tensor([tokens.input_ids]), torch.tensor(tokens.labels)
        with torch.no_grad():
            logits = model(ids, pixel_values=torch.cat(pixels) if pixels else None).logits[0]
        real = labels[1:] != -100
        of_labels = logits.log_softmax(-1)[:-1][real].gather(1, labels[1:][real][:, None])
        assert found[key].num_tokens == int(real.sum()) > 1  # the end mark, too
        assert found[key].log_prob == pytest.approx(of_labels.sum().item(), rel=1e-4), key


def test_log_probabilities_do_not_depend_on_the_batch(predictions_of):
    alone = [p.log_prob for p in predictions_of(1)]
    for size in (2, 6):
        assert [p.log_prob for p in predictions_of(size)] == pytest.approx(alone, rel=1e-4)


def test_only_the_last_answer_of_a_conversation_is_the_reference(experiment, predictions_of):
    shard = experiment.shard(1)  # "late" has two turns
    found = {p.key: p for p in predictions_of(4, f"evaluate.shards={shard}")}
    with_one_turn = found["c0"]
    assert found["late"].answer == "a teal shape" and with_one_turn.answer == "a brown line"
    assert abs(found["late"].num_tokens - with_one_turn.num_tokens) <= 3


def test_a_reference_that_is_too_long_has_none_and_is_counted(predictions_of):
    # Prompts fit, and are asked; with their answers some are longer than this.
    lengths = {}
    for limit in (200, 30):
        found = predictions_of(4, f"data.max_length={limit}")
        lengths[limit] = [p.num_tokens for p in found]
        assert all((p.log_prob is None) == (p.num_tokens == 0) for p in found)
    assert 0 not in lengths[200] and 0 in lengths[30]
    lost = lengths[30].count(0)
    assert f"student: {lost} of 6 references have no log probability" in score_table({"student": found}, [])


def test_predictions_of_an_earlier_version_are_made_again_once(experiment, tmp_path):
    config = experiment.config(tmp_path)
    file = tmp_path / "p.jsonl"
    new = evaluate_checkpoint(config, str(experiment.student), output=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    old = [{name: v for name, v in row.items() if name not in ("log_prob", "num_tokens")} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in old))
    assert not any(p.is_scored for p in read_predictions(file))
    again = evaluate_checkpoint(config, str(experiment.student), output=file)
    assert [p.log_prob for p in again] == [p.log_prob for p in new]
    before = file.stat().st_mtime_ns
    evaluate_checkpoint(config, str(experiment.student), output=file)
    assert file.stat().st_mtime_ns == before


def test_the_metrics_that_are_shown_change_no_identity(experiment, tmp_path):
    config = experiment.config(tmp_path)
    other = overridden(config, ["evaluate.metrics=[rouge_l]"], where="a test")
    assert run_identity(config) == run_identity(other)
    file = tmp_path / "p.jsonl"
    evaluate_checkpoint(config, str(experiment.student), output=file)
    before = file.stat().st_mtime_ns
    evaluate_checkpoint(other, str(experiment.student), output=file)
    assert file.stat().st_mtime_ns == before


# Token F1 and ROUGE-L


def test_words_are_runs_of_letters_and_digits_of_any_script():
    assert words("The red-Line's 2nd end.") == ["the", "red", "line", "s", "2nd", "end"]
    assert words("Ein Bär, größer!") == ["ein", "bär", "größer"]
    assert words("这是一只猫 cat") == ["这", "是", "一", "只", "猫", "cat"]
    assert words("...") == []


def test_token_f1_counts_words_as_often_as_both_have_them():
    assert token_f1("a cat on a mat", "a cat") == pytest.approx(2 * 2 / 7)
    assert token_f1("mat a on cat a", "A cat on a mat.") == 1
    assert token_f1("", "yes") == token_f1("yes", "") == 0
    assert token_f1(".", "") == 1


def test_rouge_l_is_that_of_its_paper():
    # Lin 2004: "police killed the gunman" with two candidates.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("", "") == 1 and rouge_l("", "a") == 0


def test_sentence_recall_counts_sentences_of_the_reference_that_were_said_word_for_word():
    reference = "A red picture with two things. Top left: a fox! The line is 3.5 long"
    assert sentence_recall("the line is 3.5 long. a RED picture, with two things.", reference) == 2 / 3
    assert sentence_recall("not a red picture with two things. the line is 3 long.", reference) == 0
    assert sentence_recall("yes. no", "yes. yes. no.") == 2 / 3  # said once, stated twice
    assert sentence_recall("那是红。那是蓝。", "那是红。那是绿！") == 1 / 2
    assert sentence_recall("", "") == sentence_recall(".", "!") == 1 and sentence_recall("a", "") == 0


def _longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


@given(*[st.lists(st.sampled_from(["a", "b", "c", "dog"]), min_size=1, max_size=12)] * 2)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(ours, theirs):
    common = _longest_common(tuple(ours), tuple(theirs))
    precision, recall = common / len(ours), common / len(theirs)
    expected = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)


def prediction(answer: str, said: str, kind: str = "x", log_prob=None, num_tokens=0) -> Prediction:
    return Prediction("k", "g", kind, answer, said, log_prob=log_prob, num_tokens=num_tokens)


def test_sentences_get_f1_and_rouge_by_themselves_and_short_answers_exact_match_alone():
    short, long = prediction("a red line", "x"), prediction("there is a red line on it", "x")
    assert metrics_for(EvaluateConfig(shards="s"), [short, short, long]) == ["exact_match"]
    assert metrics_for(EvaluateConfig(shards="s"), [short, long, long]) == [
        "exact_match",
        "token_f1",
        "rouge_l",
    ]
    assert metrics_for(EvaluateConfig(shards="s", metrics=["rouge_l"]), [short]) == ["rouge_l"]


def test_means_are_by_type_and_a_token_counts_as_much_in_any_answer():
    some = [
        prediction("a b", "a b", "one", -1.0, 1),
        prediction("a b", "a c", "two", -8.0, 8),
        prediction("a b", "c", "two", None, 0),
    ]
    found = scores_by_type(some, ["token_f1", "exact_match"])
    assert list(found) == ["one", "two", "all"]
    whole = found["all"]
    assert (whole.questions, whole.references) == (3, 2)
    assert (whole.per_token, whole.per_answer) == (-1.0, -4.5)
    assert whole.metrics == pytest.approx({"token_f1": 0.5, "exact_match": 1 / 3})
    assert Scores.of(some[2:], []).per_token is None


def test_the_command_shows_them_and_its_json_has_all(experiment, tmp_path, capsys):
    def evaluate(*options: str) -> None:
        overrides = [f"output_dir={tmp_path}", "evaluate.metrics=[token_f1, rouge_l]"]
        arguments = [
            "--config",
            str(experiment.file),
            "--model",
            str(experiment.student),
            *options,
            *overrides,
        ]
        with pytest.raises(SystemExit, match="0"):
            cli.main(["evaluate", *arguments])

    evaluate()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].split("  ")[0] == "all questions"
        and "ROUGE-L, %" in lines[0]
        and "log p a token" in lines[0]
    )
    evaluate("--json")
    [(test_set, found)] = json.loads(capsys.readouterr().out).items()
    assert test_set == "test" and set(found) == {"yes/no", "colour", "shape", "all questions", "all"}
    keys = {"accuracy", "questions", "token_f1", "rouge_l", "references"}
    assert set(found["all"]) == keys | {"log_prob_per_token", "log_prob_per_answer"}
    assert found["all"]["log_prob_per_answer"] < found["all"]["log_prob_per_token"] < 0
