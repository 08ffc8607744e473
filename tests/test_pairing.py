"""What stage 2 would refuse of a student is found before stage 1, which may take days."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cli


@pytest.fixture
def run(experiment, tmp_path, capsys):
    """Runs a command on the experiment with a store still to be written; gives exit code and stderr."""

    def run_command(command: str, *overrides: str) -> tuple[int, str]:
        here = [f"output_dir={tmp_path}/out", "evaluate=null"]
        if command != "distill":
            here.append(f"cache.path={tmp_path}/store")
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--config", str(experiment.file), *here, *overrides])
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run_command


@pytest.fixture
def student(experiment, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(experiment.student, tmp_path / "student"))


@pytest.mark.parametrize("command", ["plan", "teacher-cache"])
def test_a_student_without_a_tokenizer_is_found_before_anything_is_written(command, run, student, tmp_path):
    (student / "tokenizer.model").unlink()
    code, said = run(command, f"student.model={student}")
    assert code == 2 and f"No tokenizer in {student}: it needs tokenizer.model or tokenizer.json" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["plan", "teacher-cache"])
def test_so_is_a_student_of_another_family_or_with_too_few_layers(
    command, run, tiny_model, student, tmp_path
):
    tiny_model(vocab_size=600).save_pretrained(student)
    code, said = run(command, f"student.model={student}")
    assert code == 2 and "vocab_size is 600, the teacher of " in said and "use a student of the" in said
    code, said = run(command, "losses.attention.layers=[[0, 2]]")
    assert code == 2 and "asks for the student's layer 2, but" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("command", ["plan", "teacher-cache", "distill"])
def test_more_focus_tokens_than_an_image_has_are_refused(command, run, tmp_path):
    code, said = run(command, "losses.vision_focus.k=5")
    assert code == 2 and "losses.vision_focus.k is 5, but an image has 4 vision tokens; set it lower" in said
    assert not (tmp_path / "store").exists() and not (tmp_path / "out" / "align_kd" / "model").exists()


def test_as_many_focus_tokens_as_an_image_has_are_taken(run):
    assert run("teacher-cache", "losses.vision_focus.k=4")[0] == 0


@pytest.mark.parametrize("model", ["/no/such/folder", "no/such/model"])
def test_a_student_that_is_elsewhere_is_noted_and_stage_1_runs(model, run, tmp_path):
    code, said = run("teacher-cache", f"student.model={model}")
    assert code == 0 and f"student.model {model} is not on this machine; it is not checked before" in said
    assert (tmp_path / "store" / "manifest.json").is_file()


def test_a_student_that_reads_otherwise_is_noted_unless_that_is_allowed(run, student, tokenizer_folder):
    shutil.copy(tokenizer_folder / "tokenizer.model", student)
    code, said = run("teacher-cache", f"student.model={student}")
    assert (
        code == 0
        and f"student.model {student} has another tokenizer than the teacher; stage 2 refuses" in said
    )
    _, said = run("teacher-cache", f"student.model={student}", "cache.allow_mismatch=[tokenizer]")
    assert "student.model" not in said
    assert "student.model" not in run("teacher-cache")[1]
