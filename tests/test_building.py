"""What a library refuses while models and trainers are built, and a disk that is full: one sentence, an exit code."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cli
from pipeline.errors import ConfigError, PipelineError, building, writing
from pipeline.evaluation.compare import questions_of
from pipeline.models.mobilevlm import MobileVLMForCausalLM


@pytest.fixture
def refused(experiment, tmp_path, capsys):
    """Runs a command that ends with an exit code; gives the one sentence on stderr."""

    def run(code: int, command: str, *overrides: str, before: tuple[str, ...] = ()) -> str:
        settings = [f"output_dir={tmp_path}/out", "evaluate=null", *overrides]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*before, command, "--config", str(experiment.file), *settings])
        said = capsys.readouterr().err
        assert stopped.value.code == code, said
        assert ("Traceback" in said) == ("--debug" in before)
        last = said.splitlines()[-1]
        assert last.startswith("alignkd: ")
        return last.removeprefix("alignkd: ")

    return run


@pytest.fixture
def model_with(experiment, tmp_path):
    """A copy of the student whose config.json has other fields."""

    def copied(**fields) -> Path:
        folder = Path(shutil.copytree(experiment.student, tmp_path / "changed"))
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return folder

    return copied


@pytest.fixture
def small_disk():
    """No file may become larger than 100 kB: a full disk, for whoever writes a student."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr_scheduler_type=nonsense", "nonsense is not a valid SchedulerType"),
        ("train.lr_scheduler_type=cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
        ("train.fsdp=nonsense", "Unknown `fsdp` option: nonsense"),
        ("train.fsdp=full_shard", "Using fsdp only works in distributed training"),
        ("train.optim_args=foo", "not enough values to unpack"),
        ("train.torch_compile_backend=foo", "'FOO' is not a valid DynamoBackend"),
        ("train.parallelism_config=3", "'int' object has no attribute"),
        ("train.accelerator_config=nofile", "No such file or directory: 'nofile'"),
        ("train.dataloader_num_workers=-1", "num_workers option should be non-negative"),
        ("train.dataloader_persistent_workers=true", "persistent_workers option needs num_workers > 0"),
    ],
)
def test_what_transformers_torch_or_accelerate_refuse_of_the_train_section(override, said, refused):
    complaint = refused(2, "distill", override)
    assert complaint.startswith("train: ") and said in complaint
    assert complaint.endswith("; correct the `train` section")


def test_a_seed_that_is_none_is_refused_with_what_it_may_be(refused):
    assert "Seed must be between 0 and 2**32 - 1; correct the" in refused(2, "distill", "train.seed=-1")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"pad_token_id": 600},
            "config.json: pad_token_id: 600 is outside the vocabulary, vocab_size is 512; set",
        ),
        ({"pad_token_id": -513}, "config.json: pad_token_id: -513 is outside the vocabulary"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "config.json: quantization_config: quantised weights are not read, found {'quant_method': 'bitsandbytes'",
        ),
        ({"hidden_act": "foo"}, "KeyError 'foo'"),
        ({"rope_scaling": {"type": "foo", "factor": 2}}, "KeyError 'foo'"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"mm_vision_select_feature": "foo"}, "expected 'patch' or 'cls_patch', found 'foo'"),
    ],
)
@pytest.mark.parametrize(("command", "role"), [("teacher-cache", "teacher"), ("distill", "student")])
def test_a_model_that_cannot_be_built_is_named(command, role, fields, said, model_with, refused, tmp_path):
    folder = model_with(**fields)
    store = [f"cache.path={tmp_path}/store"] if role == "teacher" else []
    complaint = refused(2, command, f"{role}.model={folder}", *store)
    assert str(folder) in complaint and said in complaint


@pytest.mark.parametrize(
    "settings", [{"size": {"a": 1}}, {"size": "large"}, {"crop_size": {}}, {"image_mean": "x"}]
)
def test_an_image_processor_that_cannot_be_built_is_named(settings, model_with, refused):
    folder = model_with()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    complaint = refused(2, "distill", f"student.model={folder}")
    assert f"{folder}/preprocessor_config.json" in complaint


def test_a_tokenizer_that_cannot_be_built_is_named(model_with, refused):
    folder = model_with()
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unheard"}}')
    complaint = refused(2, "distill", f"student.model={folder}")
    assert f"{folder}/tokenizer.json: not readable as a tokenizer (" in complaint


def test_a_pad_token_counted_from_the_end_and_no_quantisation_are_let_be(model_with):
    folder = model_with(pad_token_id=-1, quantization_config=None)
    assert MobileVLMForCausalLM.from_pretrained(folder).config.pad_token_id == -1


def test_a_disk_that_is_full_at_the_last_save_names_the_folder(small_disk, refused, tmp_path):
    complaint = refused(1, "distill")
    assert complaint.startswith(f"{tmp_path}/out/align_kd/model: cannot be written (")
    assert "File too large" in complaint and complaint.endswith("; make room, and run the same command again")


def test_a_disk_that_is_full_at_a_checkpoint_names_it(small_disk, refused, tmp_path):
    complaint = refused(1, "distill", "train.save_strategy=steps", "train.save_steps=1")
    assert complaint.startswith(f"{tmp_path}/out/align_kd/checkpoint-1: cannot be written (")


def test_the_traceback_is_shown_on_demand(refused):
    assert "min_lr" in refused(
        2, "distill", "train.lr_scheduler_type=cosine_with_min_lr", before=("--debug",)
    )


def test_what_is_wrong_with_the_machine_is_1_and_with_a_setting_2():
    for error in (
        OSError(errno.ENOSPC, "full"),
        PermissionError(errno.EACCES, "no"),
        MemoryError("none left"),
    ):
        with (
            pytest.raises(PipelineError, match=r"it: .*; (make room|free memory)") as raised,
            building("it", then="x"),
        ):
            raise error
        assert type(raised.value) is PipelineError
    with pytest.raises(PipelineError) as raised, building("it", then="x"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert type(raised.value) is PipelineError
    for error in (
        OSError("no file named model.safetensors"),
        FileNotFoundError(errno.ENOENT, "no"),
        KeyError("a"),
    ):
        with pytest.raises(ConfigError, match=r"^it: .*; correct it$"), building("it", then="correct it"):
            raise error


def test_our_own_errors_and_mistakes_are_left_as_they_are():
    with pytest.raises(PipelineError, match=r"^as it is$"), building("it", then="x"):
        raise PipelineError("as it is")
    nothing: dict = None  # type: ignore[assignment]
    with pytest.raises(AttributeError), building("it", then="x"):
        questions_of(nothing)


def test_of_what_a_write_raises_only_what_is_of_writing_is_named(tmp_path, small_disk):
    large = {"a": torch.zeros(100_000)}
    for write in (
        lambda: (tmp_path / "a.txt").write_text("x" * 200_000),
        lambda: save_file(large, tmp_path / "a.safetensors"),
        lambda: torch.save(large, tmp_path / "a.bin"),
        lambda: torch.save(large, tmp_path / "b.bin", _use_new_zipfile_serialization=False),
    ):
        with (
            pytest.raises(PipelineError, match=r"^here: cannot be written \(.*full\?|File too large"),
            writing("here"),
        ):
            write()
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), writing("here"):
        raise RuntimeError("shapes differ")
