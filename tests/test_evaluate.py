"""Evaluation: greedy answers, whatever the batch, compared word for word."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import family_images
import pytest
import torch
from family_images import png
from small_experiment import held_out_records, picture, shard_members, write_shard
from small_store import flip_bit
from tiny_families import write_checkpoint
from transformers import AutoModelForImageTextToText, GenerationConfig

from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import read_shard
from pipeline.errors import BadSample, PipelineError, ShardError
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.evaluation.predictions import Prediction, accuracy_by_type, by_test_set, read_predictions
from pipeline.evaluation.questions import read_questions
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.processors import load_processor


def prediction(key: str, answer: str, said: str, kind: str = "all questions") -> Prediction:
    return Prediction(key, "image", kind, answer, said)


@pytest.fixture
def answers(experiment, tmp_path):
    """Predictions of the experiment's student, by batch size."""

    def predict(batch_size: int = 4, model=experiment.student, **changes) -> list[Prediction]:
        config = experiment.config(tmp_path, f"evaluate.batch_size={batch_size}")
        settings = config.evaluate.model_copy(update=changes)
        return evaluate_model(
            str(model), config.data, settings, output=tmp_path / f"{batch_size}" / "p.jsonl"
        )

    return predict


def test_an_answer_is_correct_word_for_word_but_for_space_around_it():
    assert prediction("a", "yes", " yes\n").correct
    assert not prediction("a", "yes", "yes.").correct
    assert not prediction("a", "yes", "Yes").correct
    assert not prediction("a", "a red circle", "red circle").correct


def test_accuracy_is_told_by_question_type_and_for_all():
    found = accuracy_by_type(
        [
            prediction("a", "yes", "yes", "yes/no"),
            prediction("b", "no", "yes", "yes/no"),
            prediction("c", "red", "red", "colour"),
            prediction("d", "red", "", "colour"),
            prediction("e", "blue", "teal", "colour"),
        ]
    )
    assert found == {"colour": (1 / 3, 3), "yes/no": (1 / 2, 2), "all": (2 / 5, 5)}
    assert list(found) == ["colour", "yes/no", "all"]


# Each changes some answer of the experiment's student if transformers is left to take it.
OF_A_CHECKPOINT = [
    {"repetition_penalty": 0.01},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4, "length_penalty": 5.0},
    {"min_new_tokens": 3, "suppress_tokens": list(range(100, 400))},
]


@pytest.mark.parametrize("settings", OF_A_CHECKPOINT, ids=lambda settings: next(iter(settings)))
def test_answers_are_greedy_whatever_the_checkpoint_says_of_generation(
    settings, answers, experiment, tmp_path
):
    model = Path(shutil.copytree(experiment.student, tmp_path / "model"))
    GenerationConfig(**settings).save_pretrained(model)
    expected = answers(max_new_tokens=8)
    assert answers(model=model, max_new_tokens=8) == expected
    network = MobileVLMForCausalLM.from_pretrained(model)
    assert all(getattr(network.generation_config, name) == value for name, value in settings.items())


def test_a_model_can_answer_in_bfloat16(answers):
    assert [p.key for p in answers(dtype="bfloat16")] == [p.key for p in answers()]


def test_answers_are_those_of_plain_greedy_decoding(experiment, answers, tmp_path):
    config = experiment.config(tmp_path)
    preparation = load_preparation(config.student.model, config.data)
    model = MobileVLMForCausalLM.from_pretrained(experiment.student, dtype=torch.float32).eval()
    prompts = {}
    for sample in read_shard(experiment.held_out / "shard-000000.tar"):
        turns = [*sample.conversations[:-1], {"from": "gpt", "value": "?"}]
        ids = preparation.tokenize(turns).input_ids
        # The prompt ends with the call to answer, whose last token is the colon before the answer.
        length = next(n for n, label in enumerate(preparation.tokenize(turns).labels) if label != -100)
        pixels = [preparation.preprocess(image)["pixel_values"] for image in sample.images]
        prompts[sample.key] = (list(ids[:length]), torch.cat(pixels) if pixels else None)
    found = {p.key: p for p in answers()}
    for key, (ids, pixels) in prompts.items():
        said = []
        for _ in range(3):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + said]), pixel_values=pixels).logits[0, -1].argmax())
            if token == preparation.tokenizer.eos_token_id:
                break
            said.append(token)
        assert found[key].prediction == preparation.tokenizer.decode(said, skip_special_tokens=True), key


ASKED = {
    "a": ((40, 28), "What colour is the circle in the image, and is there a line?"),
    "b": ((24, 60), "Is it red?"),
    "c": ((32, 32), "Describe it."),
    "d": ((40, 28), "Is there a triangle in this image, or is there only a rectangle?"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "paligemma", "qwen2_5_vl", "smolvlm"])
def test_a_model_of_another_family_answers_as_by_its_own_processor(family, tmp_path):
    model, members = write_checkpoint(family, tmp_path / "model", seed=1), []
    for key, (size, question) in ASKED.items():
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "no"}]
        members += [
            (f"{key}.json", json.dumps({"conversations": turns}).encode()),
            (f"{key}.png", png(*size)),
        ]
    write_shard(tmp_path / "shards" / "test.tar", members)
    data = DataConfig(shards=str(tmp_path / "shards"), template="chat")
    settings = EvaluateConfig(shards=data.shards, max_new_tokens=6)
    found = evaluate_model(str(model), data, settings, output=tmp_path / "p.jsonl")
    network, processor = AutoModelForImageTextToText.from_pretrained(model).eval(), load_processor(model)
    for prediction in found:
        size, question = ASKED[prediction.key]
        inputs = inputs_of(processor, family_images.picture(*size), question)
        made = network.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = made[0, inputs["input_ids"].shape[1] :]
        assert prediction.prediction == processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert any(prediction.prediction.strip() for prediction in found)


def inputs_of(processor, image, question: str):
    """Inputs of one question, by a processor's own way."""
    if processor.chat_template is None:  # PaliGemma's
        return processor(text=f"<image>{question}", images=image, return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_answers_do_not_depend_on_the_batch(answers):
    alone = answers(batch_size=1)
    assert [p.key for p in alone] == ["h0", "h1", "h2", "h3", "h4", "h5"]
    assert answers(batch_size=2) == answers(batch_size=6) == alone
    assert len({p.prediction for p in alone}) > 1


def test_every_question_has_its_type_its_answer_and_the_group_of_its_image(answers):
    found = {p.key: p for p in answers()}
    assert {key: p.question_type for key, p in found.items()} == {
        record["id"]: record.get("question_type", "all questions") for record in held_out_records()
    }
    assert found["h1"].answer == "red"
    assert found["h0"].group == found["h1"].group != found["h2"].group
    assert found["h3"].group == "h3"


def test_predictions_come_back_as_they_were_written(answers, tmp_path):
    written = answers()
    assert read_predictions(tmp_path / "4" / "p.jsonl") == written
    first = json.loads((tmp_path / "4" / "p.jsonl").read_text().splitlines()[0])
    assert first["key"] == "h0" and first["correct"] is written[0].correct


def test_a_test_sample_that_cannot_be_asked_stops_the_evaluation(answers, tmp_path):
    write_shard(tmp_path / "s" / "test.tar", [("odd.json", b"[]"), ("odd.png", picture(0))])
    with pytest.raises(
        BadSample, match=r"a test sample cannot be asked: 'odd' of .*test.tar: JSON is no object"
    ):
        answers(shards=str(tmp_path / "s"))


def test_questions_hold_no_image_and_read_it_again_when_it_is_asked_about(experiment, tmp_path):
    config = experiment.config(tmp_path)
    preparation = load_preparation(config.student.model, config.data)
    questions = list(read_questions(config.evaluate, preparation, config.data))
    assert [len(question.image_spans) for question in questions] == [1, 1, 1, 0, 2, 1]
    members = dict(shard_members(experiment.held_out / "shard-000000.tar"))
    assert not any(members["h0.png"] in pickle.dumps(question) for question in questions)
    assert questions[4].read_image(1) == picture(2)


def test_an_image_that_changed_while_it_was_evaluated_is_told(experiment, tmp_path):
    write_shard(tmp_path / "s" / "a.tar", shard_members(experiment.held_out / "shard-000000.tar"))
    config = experiment.config(tmp_path, f"evaluate.shards={tmp_path}/s")
    preparation = load_preparation(config.student.model, config.data)
    question = next(read_questions(config.evaluate, preparation, config.data))
    flip_bit(tmp_path / "s" / "a.tar", offset=question.image_spans[0].offset + 20)
    with pytest.raises(ShardError, match=r"a.tar: h0.png changed while it was evaluated; evaluate again"):
        question.read_image(0)


@pytest.mark.parametrize("content", [b'{"key": "h0", "gro', b"[1]\n", b'{"other": 1}\n', b"\xff\xfe"])
def test_predictions_that_are_none_are_named(content, tmp_path):
    (tmp_path / "predictions.jsonl").write_bytes(content)
    with pytest.raises(PipelineError, match=r"predictions.jsonl is damaged: .* remove it and evaluate again"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_several_test_sets_are_asked_at_once_and_told_apart(experiment, answers):
    one = str(experiment.held_out / "shard-000000.tar")
    both = answers(shards={"first": one, "all": str(experiment.held_out)})
    sets = by_test_set(both)
    assert {name: len(predictions) for name, predictions in sets.items()} == {"all": 6, "first": 5}
    said = {p.key: p.prediction for p in sets["all"]}
    assert all(said[p.key] == p.prediction for p in sets["first"])
    assert [p.test_set for p in answers()] == ["test"] * 6
