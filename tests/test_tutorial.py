"""docs/tutorial.md as a new user types it, and what `alignkd init` finds and chooses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families
from small_experiment import picture
from test_packing import write

import cli
from pipeline.config.config import Config, load_config
from pipeline.config.yaml_text import read_yaml
from pipeline.errors import ConfigError
from pipeline.init.begin import as_pattern, begin
from pipeline.init.look import EXAMPLE, look

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
DEMO_TEACHER = str(ROOT / "assets" / "demo_teacher")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


def alignkd(line: str, folder: Path) -> str:
    words = shlex.split(line)
    assert words[0] == "alignkd"
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_tutorial_runs_from_the_first_line_to_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for block in blocks("python"):
        exec(compile(block, "tutorial.md", "exec", dont_inherit=True), {"__name__": "page"})
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    said = {line: alignkd(line, tmp_path) for line in lines}
    begun, trained = said[lines[0]], said[lines[-1]]
    printed = [line.strip() for line in begun.partition("\nnext:\n")[2].splitlines()]
    typed = [line.removesuffix(" train.num_train_epochs=2") for line in lines]
    assert set(typed) - {lines[0]} - {line for line in typed if "inspect" in line} <= set(printed)
    assert "120 entries" in begun and "in the form of `messages`" in begun and "disk:" in begun
    assert re.search(r"accuracy, %\s+colour\s+shape\s+all\n", trained) and "paired bootstrap" in trained


def test_the_smallest_config_of_the_page_is_one():
    [block] = blocks("yaml")
    Config.model_validate(read_yaml(block))


# What init finds


@pytest.fixture
def data(tmp_path) -> Path:
    """Annotations, pictures in a folder beside them, and files that are no annotations."""
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    for number in range(4):
        (folder / "pictures" / f"{number}.png").write_bytes(picture(number))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    write(folder, [{"id": n, "image": f"{n % 4}.png", "conversations": turns} for n in range(40)])
    (folder / "info.json").write_text('{"about": "a file that is no annotations"}')
    return folder


def test_annotations_and_the_folder_of_their_images_are_found(data):
    found = look(data)
    assert (found.annotations, found.form, found.image_folder) == (
        data / "data.json", "conversations", data / "pictures",
    )  # fmt: skip
    assert look(data / "data.json") == found


def test_what_cannot_be_begun_with_is_said(data, tmp_path):
    write(data, [{"question": "Q", "answer": "A"}], "more.jsonl")
    with pytest.raises(
        ConfigError, match=r"several files of conversations: .*data.json, .*more.jsonl; name one"
    ):
        look(data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"empty holds neither shards \(.tar\) nor a file with conversations"
    ):
        look(tmp_path / "empty")
    (tmp_path / "empty" / "captions.jsonl").write_text(EXAMPLE)  # which the message shows
    assert look(tmp_path / "empty").form == "caption"
    with pytest.raises(ConfigError, match="no such file or folder; name the folder of your images"):
        look(tmp_path / "gone")


@pytest.mark.parametrize("family", ["demo", "smolvlm", "qwen3_vl"])
def test_the_config_is_valid_and_fits_the_teacher(family, data, tmp_path, family_folder):
    teacher = DEMO_TEACHER if family == "demo" else str(family_folder(family))
    said: list[str] = []
    begun = begin(data, tmp_path / "out", teacher=teacher, say=said.append)
    config = load_config(begun.config)
    assert config.data.template == ("v1" if family == "demo" else "chat")
    assert set(config.losses.active()) == {"supervised", "attention", "vision_all", "vision_focus", "logits"}
    assert config.evaluate is not None and Path(str(config.evaluate.shards)).is_file()
    assert str(config.evaluate.shards) not in str(config.data.shards)
    assert any("samples looked at: 32" in line for line in said)
    with pytest.raises(ConfigError, match=r"config.yaml is there already; name another --output"):
        begin(data, tmp_path / "out", teacher=teacher, say=said.append)


def test_any_folder_name_is_quoted_in_the_config_and_in_the_commands(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, output = Path("my teacher #1"), Path("a: {b} #c, d")
    teacher.symlink_to(DEMO_TEACHER)
    begun = begin(data, output, teacher=str(teacher), say=print)
    config = load_config(begun.config)
    assert (config.teacher.model, config.output_dir) == (str(teacher), str(output / "run"))
    assert [shlex.split(line)[1:] for line in begun.commands] == [
        ["make-student", str(teacher), str(output / "student"), "--layers", "0-1"],
        ["models", "check", str(teacher)],
        *([stage, "--config", str(begun.config)] for stage in ("teacher-cache", "distill", "evaluate")),
        ["report", str(output / "run")],
    ]


def test_samples_that_the_teacher_cannot_read_are_counted(data, tmp_path):
    long = [{"from": "human", "value": "<image>\nTell."}, {"from": "gpt", "value": "a tale " * 1000}]
    short = [{"from": "human", "value": "<image>\nTell."}, {"from": "gpt", "value": "No."}]
    said: list[str] = []
    for number, turns in (("1", [long, short, short]), ("2", [long, long, long])):
        write(data, [{"id": n, "image": "0.png", "conversations": turn} for n, turn in enumerate(turns)])
        if number == "1":
            begin(data, tmp_path / number, teacher=DEMO_TEACHER, say=said.append)
    assert "too long     1 of 3: the teacher reads 512 tokens; they are left out" in said
    with pytest.raises(ConfigError, match=r"samples are \d+ tokens long, and the teacher reads 512; shorten"):
        begin(data, tmp_path / "2", teacher=DEMO_TEACHER, say=print)


def test_a_student_that_is_not_there_is_said_before_anything_is_packed(data, tmp_path):
    with pytest.raises(ConfigError, match="model 'gone': no such local folder"):
        begin(data, tmp_path / "out", teacher=DEMO_TEACHER, student="gone", say=print)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_said_before_anything_is_packed(data, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--output .*: .*/file is a file; name a folder"):
            begin(data, output, teacher=DEMO_TEACHER, say=print)


def test_a_teacher_without_weights_ends_without_commands(data, tmp_path, capsys):
    teacher = shutil.copytree(
        DEMO_TEACHER, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main(["init", str(data), "--teacher", str(teacher), "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert stopped.value.code == 1 and "next:" not in shown.out
    assert "the plan could not be made: " in shown.err and "put it right, remove " in shown.err


def test_a_student_that_the_first_command_makes_is_not_missed(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["init", str(data), "--teacher", DEMO_TEACHER, "--output", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert stopped.value.code == 0 and "student.model" not in shown.err and "next:" in shown.out


@pytest.mark.parametrize(
    ("number", "epochs", "said"),
    [
        (40, 40, "36 samples are 5 steps of 8, and a student needs about 200"),
        (3, 50, "2 samples are 1 step of 8"),
        (1900, 1, "an epoch has at least 200 steps"),
    ],
)
def test_little_data_is_trained_on_more_often(data, tmp_path, number, epochs, said):
    write(data, [{"id": n, "question": "What is it?", "answer": "A circle."} for n in range(number)])
    begun = begin(data, tmp_path / "out", teacher=DEMO_TEACHER, say=print)
    assert load_config(begun.config).train["num_train_epochs"] == epochs
    assert f"  num_train_epochs: {epochs} # {said}" in begun.config.read_text()


def test_losses_that_do_not_fit_the_pair_are_left_out_with_the_reason(data, tmp_path, family_folder):
    """A student that sees images in other numbers of vision tokens."""
    student = tiny_families.write_checkpoint("smolvlm", tmp_path / "student")
    processor = json.loads((student / "processor_config.json").read_text())
    (student / "processor_config.json").write_text(json.dumps(processor | {"image_seq_len": 1}))
    begun = begin(
        data, tmp_path / "out", teacher=str(family_folder("smolvlm")), student=str(student), say=print
    )
    assert set(load_config(begun.config).losses.active()) == {"supervised", "logits"}
    assert "# Left out, because: losses." in begun.config.read_text()


def test_shards_are_named_by_a_range_where_they_are_one():
    names = [f"/a b/shard-{number:06d}.tar" for number in range(9, 12)]
    assert as_pattern(names) == "/a b/shard-{000009..000011}.tar"
    assert as_pattern(names[:1]) == names[0]
    assert as_pattern([*names, "/a b/other.tar"]) == [*names, "/a b/other.tar"]
    assert as_pattern([names[0], names[2]]) == [names[0], names[2]]
