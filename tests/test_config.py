"""The config: what it accepts, and what it says when it does not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import yaml
from small_experiment import STUDENT_LOSSES

from pipeline.config.config import Config, load_config, to_yaml
from pipeline.config.training_arguments import AT_LEAST_ONE, OURS
from pipeline.config.yaml_text import read_yaml
from pipeline.errors import ConfigError
from pipeline.losses.losses import LOSSES
from pipeline.targets.targets import TARGETS

SMALLEST = {
    "output_dir": "runs/x",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "data": {"shards": "shards/*.tar"},
    "cache": {"path": "teacher.zarr"},
}
WHOLE = """
output_dir: runs/x
teacher: {model: t}
student: {model: s, projector_learning_rate: 1e-3}
data: {shards: [a.tar, b.tar], template: plain}
cache: {path: teacher.zarr}
targets:
  attention: {layers: [0, 2], heads: each}
  vision: {}
  logits: {top_k: 8}
  hidden_states: {layer: 3}
  final_hidden: {codec: float32}
  query_attention: {layer: 1, heads: each}
losses:
  attention: {heads: mix, layers: [[0, 0], [2, 1]]}
  vision_all: {weight: 0.5}
  vision_focus: {k: 4, layer: 2}
  logits: {direction: jsd}
train: {learning_rate: 1e-3, num_train_epochs: 2, bf16: true, lr_scheduler_type: cosine}
evaluate: {shards: held_out.tar}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a config from a mapping or YAML text, with overrides."""

    def from_values(values: dict | str, *overrides: str) -> Config:
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return load_config(file, overrides)

    return from_values


@pytest.fixture
def complaint(load):
    """The error of a config, without the file's name."""

    def of(values: dict | str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(values, *overrides)
        return str(caught.value).partition("config.yaml")[2] or str(caught.value)

    return of


def test_a_whole_config_is_read_as_it_is_meant(load):
    config = load(WHOLE)
    assert list(config.losses.active()) == STUDENT_LOSSES
    assert list(config.targets.active()) == list(TARGETS)
    assert config.losses.attention.layers == [(0, 0), (2, 1)]
    assert config.losses.attention.teacher_layers() == [0, 2]
    assert config.student.projector_learning_rate == config.train["learning_rate"] == 1e-3
    assert config.data.shards == ["a.tar", "b.tar"]


@pytest.mark.parametrize("values", [SMALLEST, WHOLE], ids=["smallest", "whole"])
def test_a_resolved_config_loads_back_to_itself(values, load):
    config = load(values)
    assert load(to_yaml(config)) == config


def test_a_string_that_looks_like_a_number_survives_the_round_trip(load):
    config = load(SMALLEST, "output_dir='1e-3'", "cache.path='2024'")
    assert config.output_dir == "1e-3" and load(to_yaml(config)) == config


def test_a_removed_loss_is_not_computed(load):
    config = load(WHOLE, "losses.supervised=null", "losses.logits=null")
    assert list(config.losses.active()) == ["attention", "vision_all", "vision_focus"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("4E+2", 400.0), (".5e1", 5.0), ("-2.e-1", -0.2), ("0.1", 0.1), ("7", 7),
        ("true", True), ("null", None), ("nan", "nan"), ("1e", "1e"), ("e3", "e3"), ("'1e-3'", "1e-3"),
        ("runs/1e-3", "runs/1e-3"), ("[1e-3, x]", [1e-3, "x"]), ("{a: 1e2}", {"a": 100.0}),
    ],
)  # fmt: skip
def test_values_are_yaml_and_numbers_with_exponents_are_numbers(text, value):
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)


def test_overrides_are_applied_in_order_and_make_sections(load):
    config = load(
        SMALLEST,
        "train.learning_rate=1e-3",
        "targets.attention.heads=each",
        "targets.vision={}",
        "losses.vision_all.weight=2",
        "data.shards=[a.tar, b.tar]",
        "student.model=first",
        "student.model=path/with=sign",
    )
    assert config.train == {"learning_rate": 1e-3} and config.targets.attention.heads == "each"
    assert config.losses.vision_all.weight == 2.0 and config.data.shards == ["a.tar", "b.tar"]
    assert config.student.model == "path/with=sign"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learning_rate", "expected key=value, such as train.learning_rate=1e-3"),
        ("=3", "expected key=value"),
        ("output_dir.sub=3", "'output_dir' is a value, not a section"),
        ("train.max_steps=[1", "the value is not readable as YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(override, said, complaint):
    assert complaint(SMALLEST, override).startswith(f"override {override!r}: {said}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("studnet.model=x", "studnet: unknown key; did you mean 'student'?"),
        ("student.modle=x", "student.modle: unknown key; did you mean 'model'?"),
        ("losses.atention={}", "losses.atention: unknown key; did you mean 'attention'?"),
        ("losses.attention.wieght=2", "losses.attention.wieght: unknown key; did you mean 'weight'?"),
        ("targets.logits.topk=2", "targets.logits.topk: unknown key; did you mean 'top_k'?"),
        ("cache.zzz=1", "cache.zzz: unknown key; known: allow_mismatch, mirror, mirror_bytes, path"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(override, line, complaint):
    assert f"\n  {line}" in complaint(SMALLEST, override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.model=null", "student.model: Input should be a valid string, found None"),
        ("data.template=v2", "data.template: Input should be 'plain', 'v1', 'chatml' or 'chat', found 'v2'"),
        ("teacher.batch_size=0", "teacher.batch_size: expected auto, or a number from 1 on, found 0"),
        ("losses.supervised.weight=-1", "losses.supervised.weight: Input should be greater than or equal"),
        ("losses.supervised.weight=.nan", "losses.supervised.weight: Input should be greater than or equal"),
        ("losses.logits.temperature=0", "losses.logits.temperature: Input should be greater than 0"),
        ("targets.attention.layers=[]", "targets.attention.layers: List should have at least 1 item"),
        (
            "losses.attention.layers=[[0, -1]]",
            "losses.attention.layers.0.1: Input should be greater than or equal",
        ),
        ("targets.attention.layers=[1, 0]", "targets.attention.layers: layers must ascend from 0 on"),
    ],
)
def test_a_value_out_of_range_is_shown_with_its_key(override, line, complaint):
    assert f"\n  {line}" in complaint(SMALLEST, override)


def test_a_missing_key_is_named_and_all_problems_are_told_at_once(complaint):
    said = complaint({key: value for key, value in SMALLEST.items() if key != "cache"} | {"nonsense": 1})
    assert said.splitlines()[1:] == [
        "  cache: missing; the config must set it, or `caches` for several stores",
        "  nonsense: unknown key; known: baseline, cache, caches, data, evaluate, log_gradient_shares, losses, "
        "on_missing, output_dir, student, targets, teacher, train, twig",
    ]


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.targets and row.only != "twig"])
def test_a_loss_without_its_target_is_refused_with_the_remedy(name, complaint):
    first = LOSSES[name].targets[0]
    said = complaint(SMALLEST, f"losses.{name}={{}}")
    assert f"losses.{name} needs the target {first!r}, which the config does not capture; " in said
    assert f"add `targets.{first}: {{}}` or remove the loss" in said


@pytest.mark.parametrize(
    "override", ["losses.attention.layers=[[0, 0], [1, 1]]", "losses.vision_focus.layer=1"]
)
def test_a_loss_that_reads_a_layer_that_is_not_captured_is_refused(override, complaint):
    said = complaint(SMALLEST, "targets={attention: {layers: [0, 2]}, vision: {}}", override)
    assert "reads the teacher's layer 1, but targets.attention.layers is [0, 2]; add the layer there" in said


# One store or several


SEVERAL = {key: value for key, value in SMALLEST.items() if key != "cache"} | {
    "caches": [
        {"path": "a.zarr", "targets": ["attention"]},
        {"path": "b.zarr", "allow_mismatch": ["template"]},
    ],
    "targets": {"attention": {}, "vision": {}},
}


def test_several_stores_stand_in_the_place_of_one(load):
    config = load(SEVERAL)
    assert [cache.path for cache in config.all_caches()] == ["a.zarr", "b.zarr"]
    assert config.on_missing == "raise" and load(to_yaml(config)) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config and "a.zarr" in repr(config)
    one = load(SEVERAL, "caches=null", "cache.path=c.zarr")
    assert [cache.path for cache in one.all_caches()] == [one.one_cache.path] == ["c.zarr"]


def test_one_store_and_several_at_once_are_refused(complaint):
    said = complaint(SEVERAL, "cache.path=c.zarr")
    assert "\n  cache: set beside `caches`; leave one of them out: `cache` is one store, `caches` are" in said
    assert "cache: set beside `caches`" in complaint(SEVERAL, "cache.allow_mismatch=[capture]")


def test_asking_for_the_one_store_of_several_is_an_error_and_no_none(load):
    with pytest.raises(
        ConfigError,
        match=r"this works on one store, but the config names 2 \(`caches`\); .*caches=null cache.path",
    ):
        _ = load(SEVERAL).one_cache


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("caches=[]", "caches: List should have at least 1 item"),
        ("caches=[{targets: [vision]}]", "caches.0.path: missing; the config must set it"),
        (
            "caches=[{path: a, zzz: 1}]",
            "caches.0.zzz: unknown key; known: allow_mismatch, mirror, mirror_bytes, path, targets",
        ),
        ("caches=[{path: a, targets: []}]", "caches.0.targets: List should have at least 1 item"),
        (
            "caches=[{path: a}, {path: b, targets: [visoin]}]",
            "caches.1.targets names 'visoin', but `targets` reads from a store attention, vision; add "
            "`targets.visoin: {}`, or leave it out here",
        ),
        (
            "targets.vision={source: recompute}",
            "caches.1.targets names 'vision', but `targets` reads from a store attention; add",
        ),
        (
            "caches=[{path: a, targets: [vision]}, {path: b, targets: [attention, vision]}]",
            "caches.1.targets names 'vision', as caches.0.targets does; one store gives a target: leave it out of",
        ),
        ("on_missing=ignore", "on_missing: Input should be 'raise', 'skip' or 'recompute', found 'ignore'"),
    ],
)
def test_entries_that_cannot_be_are_named_by_their_place(override, line, complaint):
    named = {**SEVERAL, "caches": [{"path": "a.zarr"}, {"path": "b.zarr", "targets": ["vision"]}]}
    assert f"\n  {line}" in complaint(named, override)


def test_mixing_heads_needs_every_head(complaint):
    said = complaint(SMALLEST, "targets.attention={}", "losses.attention.heads=mix")
    assert "heads: mix needs every teacher head; set targets.attention.heads: each" in said


def test_an_unknown_training_argument_is_answered_with_the_nearest(complaint):
    said = complaint(SMALLEST, "train.learning_rat=1")
    assert (
        "\n  train.learning_rat: TrainingArguments has no 'learning_rat'; did you mean 'learning_rate'?"
        in said
    )


def test_a_training_argument_that_must_be_a_number_is_one(complaint):
    assert "\n  train.max_steps: expected a number, found 'many'" in complaint(
        SMALLEST, "train.max_steps=many"
    )
    for name in AT_LEAST_ONE:
        said = complaint(SMALLEST, f"train.{name}=0")
        assert f"\n  train.{name}: expected a number from 1 on, found 0" in said


@pytest.mark.parametrize("name", OURS)
def test_a_training_argument_set_elsewhere_or_renamed_says_where(name, complaint):
    assert f"\n  train.{name}: {OURS[name]}" in complaint(SMALLEST, f"train.{name}=1")


def test_a_file_that_is_not_there_or_not_a_config_is_named(tmp_path, complaint):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file; give --config a YAML file"):
        load_config(tmp_path / "nowhere.yaml")
    assert complaint("a: [1").startswith(": not readable as YAML")
    assert complaint("[" * 2000).startswith(": not readable as YAML")
    assert complaint("- 1").startswith(": expected a mapping of sections, found list")
    assert complaint("").startswith(": expected a mapping of sections, found NoneType")
    binary = Path(tmp_path / "config.yaml")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(binary)


def test_a_config_cannot_be_changed_after_it_was_checked(load):
    with pytest.raises(ValueError, match="frozen"):
        load(SMALLEST).student.model = "other"


# ~ is the home folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


HOMED = {
    "output_dir": "~/runs",
    "teacher": {"model": "~/teacher"},
    "student": {"model": "~/student"},
    "data": {"shards": "x.tar"},
    "cache": {"path": "~/teacher.zarr", "mirror": "~/mirror"},
    "train": {"resume_from_checkpoint": "~/runs/checkpoint-2", "fsdp_config": "~/fsdp.json"},
}


def test_the_home_folder_may_be_written_short_in_files_and_overrides(load, home):
    whole = {key: value for key, value in SMALLEST.items() if key != "cache"}
    overrides = [
        f"{section}.{key}={value}" if key else f"{section}={value}"
        for section, inner in HOMED.items()
        for key, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    ]
    for config in (load(HOMED), load(whole, *overrides)):
        paths = [config.output_dir, config.teacher.model, config.student.model, config.one_cache.path]
        paths += [str(config.one_cache.mirror), *sorted(config.train.values(), reverse=True)]
        names = ["runs", "teacher", "student", "teacher.zarr", "mirror", "runs/checkpoint-2", "fsdp.json"]
        assert paths == [f"{home}/{name}" for name in names]
        assert load(to_yaml(config)) == config
    several = load(SEVERAL, "caches=[{path: ~/a.zarr}, {path: s3://b/~}]")
    assert [cache.path for cache in several.all_caches()] == [f"{home}/a.zarr", "s3://b/~"]


def test_a_tilde_that_is_none_of_a_home_is_left_alone(load, home):
    config = load(SMALLEST, "output_dir=./~/x", "teacher.model=~nobody-of-this-name/x", "student.model=a~b")
    assert [config.output_dir, config.student.model] == ["./~/x", "a~b"]
    assert config.teacher.model == "~nobody-of-this-name/x"
