"""`train:` of the config: words that are no booleans, names that people use, and what is refused when it is read."""

from __future__ import annotations

import sys

import pytest
import yaml

import cli
from pipeline.config.config import Config, load_config, to_yaml
from pipeline.config.training_arguments import CALLED, NOTHING_IS_SENT, OURS
from pipeline.config.yaml_text import read_yaml, write_yaml
from pipeline.distill.student import training_arguments
from pipeline.errors import ConfigError

SMALLEST = {
    "output_dir": "runs/x",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "data": {"shards": "shards/*.tar"},
    "cache": {"path": "teacher.zarr"},
}


@pytest.fixture
def load(tmp_path):
    """Loads the smallest config with the text of a `train` section, and overrides."""

    def load_train(section: str = "{}", *overrides: str) -> Config:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(SMALLEST) + f"train: {section}\n")
        return load_config(file, overrides)

    return load_train


@pytest.fixture
def refused(load):
    """What is said of a `train` section, line by line, without the file's name."""

    def lines(section: str = "{}", *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            load(section, *overrides)
        return [line.removeprefix("  ") for line in str(raised.value).splitlines()[1:]]

    return lines


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("save_strategy", "no"),
        ("logging_strategy", "no"),
        ("include_num_input_tokens_seen", "no"),
        ("report_to", "none"),
    ],
)
def test_a_word_where_transformers_takes_one_is_a_word(name, word, load, tmp_path):
    for config in (
        load(f"{{{name}: {word}}}"),
        load("{}", f"train.{name}={word}"),
        load(f"{{{name}: '{word}'}}"),
    ):
        assert config.train == {name: word}
        assert read_yaml(write_yaml(config.train)) == config.train
    training_arguments(load("{use_cpu: true}", f"train.{name}={word}"), tmp_path)


@pytest.mark.parametrize("word", ["on", "off", "yes", "No", "ON"])
def test_a_word_that_transformers_does_not_take_is_shown_as_it_was_written(word, load, tmp_path):
    config = load("{use_cpu: true}", f"train.save_strategy={word}")
    with pytest.raises(ConfigError, match=f"{word} is not a valid SaveStrategy"):
        training_arguments(config, tmp_path)


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("on", True), ("True", True), ("No", False), ("off", False)]
)
@pytest.mark.parametrize(
    "name", ["bf16", "use_cpu", "tf32", "disable_tqdm", "fsdp", "resume_from_checkpoint"]
)
def test_a_boolean_may_be_written_as_yaml_1_1_has_it(name, word, value, load):
    for config in (load(f"{{{name}: {word}}}"), load("{}", f"train.{name}={word}")):
        assert config.train[name] is value


def test_booleans_elsewhere_in_the_config_may_be_so_too(load):
    config = load("{}", "baseline=yes", "log_gradient_shares=off", "student.gradient_checkpointing=On")
    assert config.baseline and not config.log_gradient_shares and config.student.gradient_checkpointing


def test_inside_a_mapping_they_are_booleans_as_they_always_were(load):
    section = "{fsdp_config: {cpu_offload: no, reshard_after_forward: yes, state_dict_type: FULL_STATE_DICT}}"
    inside = {"cpu_offload": False, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
    assert load(section).train == {"fsdp_config": inside}


def test_words_and_booleans_are_written_so_that_they_come_back(load, tmp_path):
    values = ["no", "off", "yes", "true", "1e-3", True, False, None, 0.001, 3]
    assert read_yaml(write_yaml(values)) == values
    config = load("{save_strategy: no, bf16: yes}", "data.shards=[no, on]")
    assert config.data.shards == ["no", "on"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_every_bad_key_is_told_at_once_with_what_is_meant(refused):
    section = "{lr: 1, epochs: 2, batch_size: 4, max_steps: many, bf16: maybe, learning_rat: 1, output: x, bf16s: 1}"
    assert refused(section) == [
        "train.lr: TrainingArguments has no 'lr'; did you mean 'learning_rate'?",
        "train.epochs: TrainingArguments has no 'epochs'; did you mean 'num_train_epochs'?",
        "train.batch_size: TrainingArguments has no 'batch_size'; did you mean 'per_device_train_batch_size'?",
        "train.max_steps: expected a number, found 'many'",
        "train.bf16: expected true or false, found 'maybe'",
        "train.learning_rat: TrainingArguments has no 'learning_rat'; did you mean 'learning_rate'?",
        f"train.output: {OURS['output_dir']}",
        "train.bf16s: TrainingArguments has no 'bf16s'; did you mean 'bf16'?",
    ]


@pytest.mark.parametrize(
    ("name", "called"), [(name, called) for name, names in CALLED.items() for called in names]
)
def test_what_people_call_a_training_argument_is_answered_with_its_name(name, called, refused):
    meant = OURS.get(name) or f"TrainingArguments has no {called!r}; did you mean {name!r}?"
    assert refused(f"{{{called}: 1}}") == [f"train.{called}: {meant}"]


@pytest.mark.parametrize("value", ["true", "off", "'2'"])
def test_what_is_no_number_is_told_for_each_kind_of_number(value, refused):
    found = {"true": True, "off": "off", "'2'": "2"}[value]
    for name in ("max_steps", "learning_rate", "save_total_limit", "neftune_noise_alpha"):
        if name not in OURS:
            assert refused(f"{{{name}: {value}}}") == [f"train.{name}: expected a number, found {found!r}"]


@pytest.mark.parametrize(
    "name", ["push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision"]
)
def test_what_would_send_something_is_refused_in_one_sentence(name, refused):
    assert refused("{}", f"train.{name}=true") == [f"train.{name}: {NOTHING_IS_SENT}"]


def test_float16_on_a_cpu_that_the_config_asks_for_is_refused_when_it_is_read(refused):
    (said,) = refused("{fp16: yes, use_cpu: on}")
    assert said.startswith(
        "train.fp16: a CPU does not train in float16, and train.use_cpu asks for one; set bf16"
    )


def test_float16_is_refused_where_there_is_no_gpu_before_a_store_is_opened(
    load, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = load("{fp16: true}", f"output_dir={tmp_path}/out", f"cache.path={tmp_path}/none")
    assert config.train["fp16"] is True  # a config for a GPU is read, planned and printed anywhere
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill", "--config", str(tmp_path / "config.yaml")])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "train.fp16: a CPU does not train in float16" in said
    assert not (tmp_path / "out").exists()


def test_tensorboard_that_is_not_installed_is_a_sentence(load, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = r"^train.report_to: tensorboard needs the package tensorboard, which .*, or set it to none$"
    with pytest.raises(ConfigError, match=said):
        training_arguments(load("{report_to: tensorboard, use_cpu: true}"), tmp_path)
