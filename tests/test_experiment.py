"""The experiment: both students, one table, and only what is missing is done."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_experiment import copy_of_teacher, snapshot, weights

from pipeline.config.config import labels_only, overridden
from pipeline.errors import ConfigError, ShardError
from pipeline.evaluation.experiment import run_experiment
from pipeline.evaluation.scores import evaluate_checkpoint, teacher_predictions
from pipeline.teacher_cache.teacher import cache_teacher


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """An experiment with a baseline, run once; its config, table and what was said."""
    folder = tmp_path_factory.mktemp("finished")
    config = experiment.config(folder, "baseline=true")
    evaluate_checkpoint(config, config.teacher.model)
    said: list[str] = []
    return config, run_experiment(config, say=said.append), said


def test_the_table_sets_both_students_beside_the_teacher(finished):
    _, table, said = finished
    rows = [line.split("  ")[0] for line in table.splitlines()]
    assert rows[3:6] == ["teacher", "student, Align-KD", "student, labels only"]
    assert "Align-KD against labels only: " in table and "95% interval [" in table
    assert "paired bootstrap over 5 test images with 6 questions" in table
    assert [line.split(" -> ")[0] for line in said] == [
        "student, Align-KD: supervised, attention, vision_all, vision_focus, logits",
        "student, labels only: supervised",
    ]


def test_results_are_saved_with_where_they_come_from(finished):
    config, _, _ = finished
    results = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert sorted(results) == ["accuracy", "gain", "provenance", "scores"]
    assert sorted(results["accuracy"]["test"]) == ["student, Align-KD", "student, labels only", "teacher"]
    assert results["accuracy"]["test"]["teacher"]["all"][1] == results["gain"]["test"]["num_questions"] == 6
    assert results["provenance"]["config"] == config.model_dump(mode="json")


def test_running_it_again_trains_and_asks_nothing(finished):
    config, table, _ = finished
    output = Path(config.output_dir)
    before = {n: v for n, v in snapshot(output).items() if n != "results.json"}
    assert run_experiment(config, say=lambda line: None) == table
    assert {n: v for n, v in snapshot(output).items() if n != "results.json"} == before


def test_scores_of_sentences_stand_below_the_accuracies(finished):
    config, table, _ = finished
    assert "ROUGE-L" not in table
    asked = overridden(config, ["evaluate.metrics=[exact_match,token_f1,rouge_l]"], where="test")
    below = run_experiment(asked, say=lambda line: None).partition("\n\n")[2]
    assert re.match(r"all questions +token F1, % +ROUGE-L, % +log p a token +log p an answer\n", below)


def test_without_held_out_questions_the_student_is_only_trained(experiment, tmp_path):
    said = run_experiment(experiment.config(tmp_path, "evaluate=null"), say=lambda line: None)
    assert (
        said
        == f"student trained: {tmp_path}/align_kd/model; no `evaluate` section, so no accuracy was measured"
    )
    assert (tmp_path / "align_kd" / "model" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"no `evaluate` section; name held-out shards as evaluate.shards"):
        evaluate_checkpoint(experiment.config(tmp_path, "evaluate=null"), "anything")


def test_held_out_shards_that_are_not_there_are_told_before_the_training(experiment, tmp_path):
    config = experiment.config(tmp_path, f"evaluate.shards={tmp_path}/nowhere")
    with pytest.raises(ShardError, match=r"No shard at .*nowhere"):
        run_experiment(config, say=lambda line: None)
    assert not (tmp_path / "align_kd").exists()


def test_a_teacher_that_answered_other_questions_is_left_out_of_the_table(experiment, tmp_path):
    held_out = tmp_path / "held_out"
    shutil.copytree(experiment.held_out, held_out)
    config = experiment.config(tmp_path, f"evaluate.shards={held_out}")
    evaluate_checkpoint(config, config.teacher.model)
    (held_out / "shard-000001.tar").unlink()
    table = run_experiment(config, say=lambda line: None)
    assert table.startswith(f"{tmp_path}/teacher/predictions.jsonl answers other questions than the students")
    assert "run `alignkd evaluate` with this config" in table
    assert not any(line.startswith("teacher ") for line in table.splitlines())


@pytest.mark.parametrize("asked", ["teacher.model={student}", "evaluate.max_new_tokens=4"])
def test_answers_of_another_teacher_or_to_other_settings_are_not_the_teachers(asked, experiment, tmp_path):
    config = experiment.config(tmp_path)
    evaluate_checkpoint(config, config.teacher.model)
    said: list[str] = []
    assert teacher_predictions(config, say=said.append) and not said
    other = experiment.config(tmp_path, asked.format(student=experiment.student))
    assert teacher_predictions(other, say=said.append) is None
    assert (
        "was made with other teacher weights, or asked in another way, than this config says: the teacher"
        in said[0]
    )


@pytest.fixture
def taught(experiment, tmp_path):
    """A teacher that a test may change, its store and its answers; asks for these again, with what is said."""
    teacher = copy_of_teacher(experiment, tmp_path / "teacher_model")

    def config(*overrides: str):
        return experiment.config(
            tmp_path, f"teacher.model={teacher}", f"cache.path={tmp_path}/store", *overrides
        )

    def again(*overrides: str):
        said: list[str] = []
        return teacher_predictions(config(*overrides), say=said.append), said

    cache_teacher(config())
    evaluate_checkpoint(config(), str(teacher))
    return teacher, config, again


def change_weights(folder: Path) -> None:
    tensors = weights(folder)
    tensors["lm_head.weight"] *= -1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_answers_of_a_teacher_whose_weights_changed_in_their_place_are_not_the_teachers(taught):
    teacher, _, again = taught
    assert again()[0] and not again()[1]
    change_weights(teacher)
    answers, said = again()
    assert answers is None and "was made with other teacher weights" in said[0]


def test_answers_of_the_same_weights_elsewhere_or_touched_are_the_teachers(taught, tmp_path):
    teacher, _, again = taught
    (teacher / "model.safetensors").touch()
    assert again()[0]
    moved = teacher.rename(tmp_path / "moved")
    assert again(f"teacher.model={moved}")[0]


def test_files_that_were_not_touched_are_not_read(taught):
    teacher, _, again = taught
    file = teacher / "model.safetensors"
    state = file.stat()
    change_weights(teacher)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert again()[0]  # as good as untouched: nothing else shows that it is not


def test_where_the_teacher_is_not_the_store_says_whose_answers_they_are(taught, experiment):
    teacher, config, again = taught
    shutil.rmtree(teacher)
    assert again()[0]
    shutil.copytree(experiment.teacher, teacher)
    change_weights(teacher)
    evaluate_checkpoint(config(), str(teacher))
    shutil.rmtree(teacher)
    assert again()[0] is None


def test_answers_of_an_earlier_version_do_not_say_whose_they_are_and_are_stamped_without_asking(
    taught, tmp_path
):
    teacher, config, again = taught
    file = tmp_path / "teacher" / "predictions.jsonl"
    stamp = file.with_suffix(".stamp.json")
    mark = json.loads(stamp.read_text())
    del mark["weights"]
    stamp.write_text(json.dumps(mark))
    assert again()[0] is None
    assert not was_asked_again(config(), teacher, file)
    assert again()[0]


def test_the_student_on_labels_alone_keeps_the_weight_of_the_labels(experiment, tmp_path):
    config = experiment.config(tmp_path, "losses.supervised.weight=0.5")
    assert labels_only(config).losses.active() == {"supervised": config.losses.active()["supervised"]}


# Predictions are kept for as long as they are those of the same weights and questions


def model_copy(experiment, folder: Path) -> Path:
    return Path(shutil.copytree(experiment.student, folder / "model"))


@pytest.fixture
def evaluated(experiment, tmp_path):
    shutil.copytree(experiment.held_out, tmp_path / "held_out")
    model = model_copy(experiment, tmp_path)
    config = experiment.config(tmp_path, f"evaluate.shards={tmp_path}/held_out")
    file = tmp_path / "predictions.jsonl"
    evaluate_checkpoint(config, str(model), output=file)
    return config, model, file


def was_asked_again(config, model, file) -> bool:
    before = file.stat().st_mtime_ns
    evaluate_checkpoint(config, str(model), output=file)
    return file.stat().st_mtime_ns != before


def test_nothing_is_asked_again_while_nothing_changed(evaluated):
    config, model, file = evaluated
    assert not was_asked_again(config, model, file)
    other_batches = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"batch_size": 2})}
    )
    assert not was_asked_again(other_batches, model, file)


def test_other_weights_are_asked_again(evaluated):
    config, model, file = evaluated
    tensors = weights(model)
    tensors["lm_head.weight"] *= -1
    before = file.read_text()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert was_asked_again(config, model, file)
    assert file.read_text() != before


def test_other_questions_are_asked_again(evaluated, tmp_path):
    config, model, file = evaluated
    (tmp_path / "held_out" / "shard-000001.tar").unlink()
    assert was_asked_again(config, model, file)
    assert len(file.read_text().splitlines()) == 5


def test_another_length_of_answers_is_asked_again(evaluated):
    config, model, file = evaluated
    longer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"max_new_tokens": 5})})
    assert was_asked_again(longer, model, file)


def test_predictions_without_their_stamp_are_not_trusted(evaluated):
    config, model, file = evaluated
    file.with_suffix(".stamp.json").unlink()
    assert was_asked_again(config, model, file)


def test_predictions_say_where_they_come_from(evaluated):
    config, _, file = evaluated
    made = json.loads(file.with_suffix(".stamp.json").read_text())["provenance"]
    assert made["config"] == config.model_dump(mode="json") and made["versions"]["torch"]


def test_predictions_of_another_model_are_kept_under_its_name(experiment, tmp_path):
    config = experiment.config(tmp_path)
    model = model_copy(experiment, tmp_path / "some")
    evaluate_checkpoint(config, str(model))
    assert [str(f.parent.name) for f in tmp_path.glob("*/predictions.jsonl")] == [
        str(model).strip("/").replace("/", "_")
    ]
