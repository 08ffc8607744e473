"""The command line: results on stdout, progress and one clear sentence on stderr, exit codes as documented."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from small_experiment import picture, snapshot, training_records
from watched import interrupt_in_batch

import cli
from cache import Store
from pipeline.config.config import load_config
from pipeline.teacher_cache.teacher import cache_teacher

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """What follows the program's name on stderr: the one sentence (a config lists its problems below it)."""
        assert "Traceback" not in self.err and self.err.count("alignkd: ") == 1, self.err
        return self.err.partition("alignkd: ")[2].strip()


@pytest.fixture
def alignkd(capsys):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Ran(int(stopped.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def settings(experiment, tmp_path):
    """--config and what every test overrides."""
    return ["--config", experiment.file, f"output_dir={tmp_path}/out"]


@pytest.fixture
def store_copy(experiment, tmp_path) -> Path:
    return Path(shutil.copytree(experiment.store, tmp_path / "copy.zarr"))


def flip_a_byte(store: Path, part: str, array: str) -> Path:
    file = max((store / "parts" / part / array).rglob("c/**/*"), key=lambda f: f.stat().st_size * f.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(bytes(data))
    return file


# What each command prints


@pytest.mark.slow
def test_help_and_a_bare_call_import_no_torch():
    script = (
        "import sys, cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'pipeline.config.config'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    lines = ran.stdout.strip().splitlines()
    assert lines[-1] == "[]", ran.stderr
    for command in ("pack", "teacher-cache", "distill", "evaluate", "info", "verify"):
        assert any(line.strip().startswith(command) for line in lines), command
    assert "Exit codes: 0 done; 1 a check failed" in " ".join(ran.stdout.split())


def test_pack_counts_what_it_packed_and_what_it_rejected(alignkd, tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0))
    records = [training_records()[0], {**training_records()[1], "image": "missing.png"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    ran = alignkd("pack", tmp_path / "a.json", tmp_path / "out", "--image-folder", tmp_path)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        f"{tmp_path}/out: 2 samples seen = 1 packed + 1 rejected, 1 shards",
        "  1 rejected: missing image file",
        f"  the list is in {tmp_path}/out/rejects.jsonl",
    ]


def test_a_pack_that_kept_nothing_fails_also_when_it_is_found_finished(alignkd, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{**training_records()[0], "image": "missing.png"}]))
    for done in ("", f"{tmp_path}/out holds a finished pack of this input: nothing was done; --again packs "):
        ran = alignkd("pack", tmp_path / "a.json", tmp_path / "out", "--image-folder", tmp_path)
        assert ran.code == 1 and f"alignkd: nothing was packed of {tmp_path}/a.json" in ran.err
        assert ran.out.startswith(f"{tmp_path}/out: 1 samples seen = 0 packed + 1 rejected, 0 shards")
        assert done in ran.err


def test_pack_again_replaces_a_pack_by_a_smaller_one_only_when_asked(alignkd, tmp_path):
    records = [{**record, "image": f"{number}.png"} for number, record in enumerate(training_records()[:2])]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    command = ("pack", tmp_path / "a.json", tmp_path / "out", "--image-folder", tmp_path)
    assert alignkd(*command).code == 0
    (tmp_path / "1.png").unlink()
    refused = alignkd(*command, "--again")
    assert refused.code == 1 and "it holds 2 samples, and packed again it would hold 1;" in refused.err
    replaced = alignkd(*command, "--again", "--allow-fewer")
    assert replaced.code == 0 and "2 samples seen = 1 packed + 1 rejected" in replaced.out


def test_pack_shows_its_progress_apart_from_its_result(alignkd, tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.json").write_text(json.dumps([{**training_records()[0], "image": "0.png"}] * 40))
    command = ("pack", tmp_path / "a.json", tmp_path / "out", "--image-folder", tmp_path)
    ran = alignkd(*command)
    assert ran.code == 0 and ran.err == ""  # it took less than 30 seconds
    monkeypatch.setattr("pipeline.progress.can_redraw", lambda stream: True)
    ran = alignkd(*command, "--again")
    assert "pack: 40 of 40 entries" in ran.err and "of 40" not in ran.out


def test_teacher_cache_prints_its_counts_and_shows_progress_apart(alignkd, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.progress.can_redraw", lambda stream: True)
    ran = alignkd("teacher-cache", *settings, f"cache.path={tmp_path}/s", "data.max_length=60")
    cached = len(Store(tmp_path / "s"))
    assert ran.code == 0 and 0 < cached < 13
    first, second, *reasons = ran.out.splitlines()
    assert first == (
        f"{tmp_path}/s: 3 parts written, 0 found done; "
        f"13 samples seen = {cached} cached + {13 - cached} rejected"
    )
    assert second.startswith(f"the store holds {cached} samples in ")
    assert reasons == [f"  {13 - cached} rejected: too long", "  the list is in the parts' rejects.jsonl"]
    assert "samples/s" in ran.err and "samples/s" not in ran.out
    again = alignkd("teacher-cache", *settings, f"cache.path={tmp_path}/s", "data.max_length=60")
    assert again.out.startswith(f"{tmp_path}/s: 0 parts written, 3 found done; 0 samples seen = 0 cached + 0")


def test_distill_prints_the_table_alone_and_the_log_apart(alignkd, settings):
    ran = alignkd("distill", *settings, "baseline=true")
    assert ran.code == 0
    assert ran.out.startswith("accuracy, %") and "Align-KD against labels only: " in ran.out
    assert "loss" not in ran.out and "step 1 of 2, loss " in ran.err
    assert "student, labels only: supervised -> " in ran.err


def test_evaluate_prints_a_table_or_json(alignkd, settings, experiment):
    ran = alignkd("evaluate", *settings)
    assert ran.code == 0 and ran.out.splitlines()[3].startswith("teacher")
    scores = json.loads(alignkd("evaluate", *settings, "--model", experiment.student, "--json").out)
    assert list(scores) == ["test"]
    assert scores["test"]["all"]["questions"] == 6 and 0 <= scores["test"]["all"]["accuracy"] <= 1
    assert list(scores["test"]) == ["all questions", "colour", "shape", "yes/no", "all"]


def test_info_describes_a_store_in_words_and_in_json(alignkd, experiment):
    ran = alignkd("info", experiment.store)
    assert ran.code == 0
    for words in (
        "3 layers, 4 heads, width 32, 4 vision tokens; whole model",
        "parts       3 of 3",
        "samples     13 cached, 0 rejected",
        "dedupe factor 1.",
        "attention/layer_0",
        "I D N = *x32x*",
        "logits/tail",
        "image preprocessing",
        "made        20",
    ):
        assert words in ran.out, words
    found = json.loads(alignkd("info", experiment.store, "--json").out)
    assert found["samples"] == 13 and found["parts_done"] == 3
    assert {array["name"] for array in found["arrays"]} >= {"vision", "input_ids", "attention/layer_1"}


def test_info_counts_rejects_by_what_was_wrong_not_by_sample(alignkd, experiment, tmp_path):
    cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/s", "data.max_length=60"))
    reasons = [line for line in alignkd("info", tmp_path / "s").out.splitlines() if "rejected: " in line]
    assert len(reasons) == 1 and reasons[0].endswith(" rejected: too long")


def test_verify_says_that_all_is_well_or_names_the_file(alignkd, store_copy):
    sound = alignkd("verify", store_copy, "--deep")
    assert sound.code == 0 and sound.out.startswith(f"{store_copy}: 0 problems in 3 parts, 13 samples, ")
    assert "(contents not read; --deep does)" in alignkd("verify", store_copy).out
    file = flip_a_byte(store_copy, "shard-000001", "vision")
    damaged = alignkd("verify", store_copy, "--deep")
    assert damaged.code == 1
    assert damaged.out.startswith(f"checksum: {file.relative_to(store_copy)}: its blake3 is ")
    report = alignkd("verify", store_copy, "--deep", "--json")
    assert report.code == 1
    assert json.loads(report.out)["problems"][0]["file"] == str(file.relative_to(store_copy))


@pytest.mark.parametrize("command", ["teacher-cache", "distill"])
def test_print_config_prints_what_can_be_read_back_and_does_nothing(
    command, alignkd, settings, experiment, tmp_path
):
    ran = alignkd(command, *settings, "losses.logits.weight=0.5", "--print-config")
    assert ran.code == 0
    (tmp_path / "printed.yaml").write_text(ran.out)
    assert load_config(tmp_path / "printed.yaml") == experiment.config(
        tmp_path / "out", "losses.logits.weight=0.5"
    )
    assert not (tmp_path / "out").exists()


def test_a_home_folder_after_an_options_equals_sign_is_meant(
    alignkd, settings, experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(experiment.file, tmp_path / "config.yaml")
    ran = alignkd("evaluate", "--config=~/config.yaml", settings[2], "--output=~/made/predictions.jsonl")
    assert ran.code == 0 and (tmp_path / "made" / "predictions.jsonl").is_file()


# What goes wrong outside the program: one sentence and an exit code

COMMANDS_WITH_CONFIG = ["teacher-cache", "distill", "evaluate"]


@pytest.mark.parametrize("command", COMMANDS_WITH_CONFIG)
def test_a_missing_config_is_2(command, alignkd, tmp_path):
    ran = alignkd(command, "--config", tmp_path / "none.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.complaint == (
        f"config {tmp_path}/none.yaml: no such file; give --config a YAML file such as configs/demo.yaml"
    )


@pytest.mark.parametrize("command", COMMANDS_WITH_CONFIG)
def test_an_unknown_key_is_2_and_the_known_one_is_asked_for(command, alignkd, settings):
    ran = alignkd(command, *settings, "teacher.batchsize=4")
    assert ran.code == 2
    assert ran.complaint.splitlines()[1:] == ["  teacher.batchsize: unknown key; did you mean 'batch_size'?"]


def test_a_wrong_command_line_is_2(alignkd, tmp_path):
    assert alignkd("cache-teacher").code == 2
    assert alignkd("info", tmp_path, "--deep").code == 2
    wrong = alignkd("pack", "a.json", tmp_path, "--image-folder", tmp_path, "--on-bad-sample", "skip")
    assert wrong.code == 2 and "'skip' is not one of 'reject', 'fail'" in " ".join(wrong.err.split())


def test_a_model_that_is_nowhere_is_2(alignkd, settings, tmp_path):
    overrides = ["teacher.model=no/such/model", f"cache.path={tmp_path}/s"]
    ran = alignkd("teacher-cache", *settings, *overrides)
    assert ran.code == 2
    assert ran.complaint.startswith("model 'no/such/model': no such local folder, found nothing; name a")


@pytest.mark.parametrize("command", ["info", "verify"])
def test_no_store_is_1(command, alignkd, tmp_path):
    ran = alignkd(command, tmp_path / "none.zarr")
    assert (ran.code, ran.out) == (1, "")
    assert ran.complaint.startswith(f"No teacher store at {tmp_path}/none.zarr: asked for a directory with")


def test_no_store_to_distill_from_is_1(alignkd, settings, tmp_path):
    ran = alignkd("distill", *settings, f"cache.path={tmp_path}/none.zarr")
    assert ran.code == 1 and "write one with `alignkd teacher-cache`" in ran.complaint


def test_no_shards_are_1(alignkd, settings, tmp_path):
    ran = alignkd("teacher-cache", *settings, f"data.shards={tmp_path}/none/*.tar")
    assert ran.code == 1 and ran.complaint.startswith(
        f"No shard at {tmp_path}/none/*.tar: there is no folder"
    )


@pytest.mark.parametrize("command", ["teacher-cache", "distill"])
def test_another_fingerprint_is_3_with_field_both_values_and_the_remedy(
    command, alignkd, settings, experiment
):
    before = snapshot(experiment.store)
    ran = alignkd(command, *settings, "data.template=plain")
    assert ran.code == 3
    assert (
        f"The store at {experiment.store} holds something else than what was asked (stored -> mine): template: "
        in (ran.complaint)
    )
    assert " -> " in ran.complaint and ran.complaint.rstrip(".").endswith(
        ("write to another directory", "--allow-mismatch FIELD lets it differ")
    )
    assert snapshot(experiment.store) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_part_stops_distilling_with_1_and_names_the_file(workers, alignkd, settings, store_copy):
    """Also where a worker of torch's loader reads it, which would raise its own error, of many lines."""
    file = flip_a_byte(store_copy, "shard-000001", "attention/layer_0")
    overrides = [f"cache.path={store_copy}", "train.max_steps=4", f"train.dataloader_num_workers={workers}"]
    ran = alignkd("distill", *settings, *overrides)
    assert ran.code == 1 and len(ran.complaint.splitlines()) == 1 and "Traceback" not in ran.err
    assert str(file.relative_to(store_copy)) in ran.complaint and " is damaged" in ran.complaint
    assert "(reading sample " in ran.complaint and "`alignkd verify --deep`" in ran.complaint


def test_a_part_that_is_not_there_stops_distilling_with_2(alignkd, settings, store_copy):
    shutil.rmtree(store_copy / "parts" / "shard-000002")
    ran = alignkd("distill", *settings, f"cache.path={store_copy}")
    assert ran.code == 2 and "no finished part for 1 of 3 shards, first 'shard-000002'" in ran.complaint


def test_a_broken_shard_is_1_after_the_others_are_cached(alignkd, settings, experiment, tmp_path):
    shutil.copytree(experiment.shards, tmp_path / "shards")
    (tmp_path / "shards" / "shard-000000.tar").write_bytes(b"garbage" * 1000)
    overrides = [f"data.shards={tmp_path}/shards", f"cache.path={tmp_path}/s"]
    ran = alignkd("teacher-cache", *settings, *overrides)
    assert ran.code == 1
    assert ran.out.startswith(f"{tmp_path}/s: 2 parts written, 0 found done; 8 samples seen = 8 cached + 0")
    said = ran.complaint.splitlines()
    assert said[0] == "1 shard could not be cached:"
    assert said[1].startswith(f"{tmp_path}/shards/shard-000000.tar is no tar file")


def test_an_interrupted_run_is_130_and_leaves_no_half_a_part(alignkd, settings, tmp_path):
    with interrupt_in_batch(1):
        ran = alignkd("teacher-cache", *settings, f"cache.path={tmp_path}/s")
    assert ran.code == 130 and "Traceback" not in ran.err
    assert Store(tmp_path / "s").parts == () and not list((tmp_path / "s" / "tmp").iterdir())


def test_a_loss_that_is_not_finite_is_1(alignkd, settings):
    ran = alignkd(
        "distill", *settings, "train.learning_rate=1e30", "train.max_steps=4", "train.max_grad_norm=0"
    )
    assert ran.code == 1 and "lower train.learning_rate" in ran.complaint


def test_a_place_that_cannot_be_written_to_is_1(alignkd, experiment, tmp_path):
    (tmp_path / "file").write_text("")
    ran = alignkd("distill", "--config", experiment.file, f"output_dir={tmp_path}/file/out")
    assert ran.code == 1 and str(tmp_path / "file") in ran.complaint


def test_sweep_prints_a_table_and_leaves_a_picture(alignkd, settings, tmp_path):
    vary = ["--vary", "losses=logits", "--vary", "train.seed=0,1", "--output", tmp_path / "sweep"]
    listed = alignkd("sweep", *settings, *vary, "--dry-run")
    assert listed.out.splitlines() == [
        f"losses={losses},train.seed={seed}" for seed in (0, 1) for losses in ("none", "logits")
    ]
    assert not (tmp_path / "sweep").exists()
    ran = alignkd("sweep", *settings, *vary)
    assert ran.code == 0 and ran.out.startswith("test set test: 6 questions of 5 images\n")
    assert [line.split()[0] for line in ran.out.splitlines()[4:6]] == ["losses=none", "losses=logits"]
    assert {"summary.png", "summary.svg", "summary.json", "runs.jsonl", "sweep.json"} <= {
        file.name for file in (tmp_path / "sweep").iterdir()
    }


def test_a_sweep_with_a_failed_run_prints_the_others_and_exits_with_1(alignkd, settings, tmp_path):
    vary = ["--vary", "train.learning_rate=1e-3,1e30", "--output", tmp_path / "sweep"]
    ran = alignkd("sweep", *settings, "train.max_steps=4", *vary)
    assert ran.code == 1 and "FAILED" in ran.err and "losses=none" in ran.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("sweep --config configs/demo.yaml", "matplotlib"),
        ("report runs", "jinja2"),
        ("inspect attention runs/demo/teacher.zarr 0", "matplotlib"),
    ],
)
def test_a_command_without_its_optional_package_says_what_to_install(command, package):
    script = "import sys; sys.modules[{!r}] = None; import cli; cli.main({!r}.split())".format
    ran = subprocess.run(
        [sys.executable, "-c", script(package, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f" needs the package {package}, which is not installed; " in ran.stderr
    assert ran.stderr.startswith("alignkd: alignkd ") and "pip install 'alignkd[report]'" in ran.stderr


def test_the_version_names_what_decides_numbers(alignkd):
    ran = alignkd("--version")
    expected = r"alignkd \d\S* \(Python 3\.\d+\.\d+, torch \S+, transformers \S+, zarr \S+\)\n"
    assert ran.code == 0 and re.fullmatch(expected, ran.out)


def test_the_help_lists_every_command_once_in_its_group_with_its_whole_first_line(alignkd):
    shown = alignkd("--help").out
    assert [line.rstrip(":") for line in shown.splitlines() if re.fullmatch(r"\w+:", line)] == [
        "Options", "Stages", "Experiments", "Store", "Sharing", "Phones", "Twigs",
    ]  # fmt: skip
    listed = re.findall(r"^  ([a-z][a-z-]+)  ", shown, flags=re.M)
    assert sorted(listed) == sorted(typer.main.get_command(cli.app).commands)
    assert "..." not in shown.partition("Stages:")[2]
