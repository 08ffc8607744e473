"""The YAML config of both stages: its fields and defaults, `key=value` overrides, and its error messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from pipeline.config.cache_settings import (
    MIRROR_BYTES,
    CacheConfig,
    Caches,
    OnMissing,
    check_one_or_several,
)
from pipeline.config.consistency import check_consistent
from pipeline.config.model_settings import DType, StudentConfig, TeacherConfig
from pipeline.config.suggested_layers import with_suggested_layers
from pipeline.config.training_arguments import checked_training_arguments
from pipeline.config.twig_settings import TwigConfig, with_base_for_student
from pipeline.config.yaml_text import read_yaml, write_yaml
from pipeline.errors import ConfigError, did_you_mean
from pipeline.losses.losses import LOSSES
from pipeline.settings import LocalPath, Section
from pipeline.targets.targets import TARGETS

Shards = str | list[str]
Metric = Literal["exact_match", "token_f1", "rouge_l", "sentence_recall"]


class DataConfig(Section):
    """The training samples, and how a sample becomes tokens and pixels."""

    shards: Shards
    """WebDataset shards: a brace pattern, a glob, a folder, a URL (s3://, gs://, hf://, https://), for stage 1 also a
    command (`pipe:`), or a list of them. [stage 1, stage 2; run]"""
    held_out_shards: Shards | None = Field(default=None, exclude_if=lambda shards: shards is None)
    """Shards of held-out samples, for `train.eval_strategy`: stage 1 captures them, too, and stage 2 never trains on
    them, not even where `shards` names them. [stage 1, stage 2; run]"""
    mirror: LocalPath | None = Field(default=None, exclude_if=lambda mirror: mirror is None)
    """Folder that keeps what is read of shards behind URLs by ranges; null keeps nothing. [stage 2, evaluate]"""
    mirror_bytes: int = Field(default=MIRROR_BYTES, ge=1, exclude_if=lambda size: size == MIRROR_BYTES)
    """Largest size of the mirror. [bytes; stage 2, evaluate]"""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the images, with all samples of each. Images are chosen by digest, so that on every machine 2% of the
    images are part of the 10%. [share; stage 2; run]"""
    template: Literal["plain", "v1", "chatml", "chat"] = "v1"
    """Text around the turns: a template of MobileVLM V2, or the checkpoint's own (`chat`).
    [stage 1, stage 2, evaluate; store, run]"""
    max_length: int = Field(default=2048, ge=1)
    """Most tokens of a sample, vision tokens included; a longer sample is rejected.
    [tokens; stage 1, stage 2, evaluate; store, run]"""
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    """Most pixels of an image; a larger image is rejected. [pixels; stage 1, stage 2, evaluate; run]"""
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    """MobileVLM V2 pads an image to a square, or resizes it to one. [stage 1, stage 2, evaluate; store, run]"""
    on_bad_sample: Literal["reject", "fail"] = "reject"
    """`reject` lists a bad sample with its reason and leaves it out; `fail` stops. [stage 1; run]"""
    shuffle_block: int = Field(default=1, ge=1, exclude_if=lambda block: block == 1)
    """Neighbours of the store, which share its chunks, that stay near each other in the random order of an epoch. Use
    16 to 32 where reading is slow: from a URL or a disk. [samples; stage 2; run]"""

    def captured_shards(self) -> list[str]:
        """Return what `shards` and `held_out_shards` name: the shards of stage 1."""
        given = [self.shards, self.held_out_shards or []]
        return [one for some in given for one in ([some] if isinstance(some, str) else some)]


# One optional section for each row of the two tables.
# Targets and losses added later are left out of records while they are null: records of older runs stay valid.
_FIRST_TARGETS = ("attention", "vision", "logits")
_TARGETS: dict[str, Any] = {
    name: (
        target | None,
        None if name in _FIRST_TARGETS else Field(default=None, exclude_if=lambda asked: asked is None),
    )
    for name, target in TARGETS.items()
}
_LOSSES: dict[str, Any] = {
    name: (
        loss.settings | None,
        Field(default=None, exclude_if=lambda asked: asked is None)
        if loss.only == "twig"
        else (loss.settings() if name == "supervised" else None),
    )
    for name, loss in LOSSES.items()
}


class TargetsConfig(create_model("Targets", __base__=Section, **_TARGETS)):
    """What stage 1 keeps of the teacher. A target left out (null) is not captured.

    With `source: recompute` a target is not stored: stage 2 recomputes it during training.
    """

    def active(self) -> dict[str, Any]:
        """Return the targets that losses may read, by name."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name)}

    def cached(self) -> dict[str, Any]:
        """Return the targets that stage 1 captures and the store holds."""
        return {name: target for name, target in self.active().items() if not target.is_recomputed}

    def recomputed(self) -> dict[str, Any]:
        """Return the targets that stage 2 recomputes with a stub of the teacher."""
        return {name: target for name, target in self.active().items() if target.is_recomputed}


class LossesConfig(create_model("Losses", __base__=Section, **_LOSSES)):
    """The terms that compare the student with labels and teacher. A loss left out (null) is not computed."""

    def active(self) -> dict[str, Any]:
        """Return the settings of the losses that are computed, by name."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name)}


class EvaluateConfig(Section):
    """Held-out conversations, answered greedily and compared word for word."""

    shards: Shards | Annotated[dict[str, Shards], Field(min_length=1)]
    """Shards as in `data.shards`: of one test set, or of several by name. [stage 2, evaluate]"""
    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer. [tokens; stage 2, evaluate]"""
    dtype: DType = "float32"
    """Dtype of the model's weights while it answers. [stage 2, evaluate]"""
    batch_size: int = Field(default=32, ge=1)
    """Questions answered together. [questions; stage 2, evaluate]"""
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = None
    """What is shown beside the reference's log probability; null: exact match, and where the median reference has
    more than five words token F1 and ROUGE-L, too. `sentence_recall` is the share of the reference's sentences that
    the answer has word for word. [stage 2, evaluate]"""

    def test_sets(self) -> dict[str, Shards]:
        """Return the shards by the test set's name; a single one is called `test`."""
        return self.shards if isinstance(self.shards, dict) else {"test": self.shards}


class Config(Section):
    """An experiment: both stages and the evaluation."""

    output_dir: LocalPath
    """Folder of the results. [stage 2, evaluate]"""
    teacher: TeacherConfig
    student: StudentConfig
    twig: TwigConfig | None = Field(default=None, exclude_if=lambda twig: twig is None)
    data: DataConfig
    caches: Caches = None
    cache: CacheConfig | None = Field(default=None, validate_default=True)
    on_missing: OnMissing = "raise"
    """A sample that a store lacks: `raise` an error, `skip` the sample, or `recompute` its targets. Part of the run
    only with `caches`. [stage 2; run]"""
    targets: TargetsConfig = TargetsConfig()
    losses: LossesConfig = LossesConfig()
    train: dict[str, Any] = {}
    """TrainingArguments of transformers, by their own names: see [train](#train). [stage 2; run]"""
    evaluate: EvaluateConfig | None = None
    baseline: bool = False
    """Train the same student on labels alone, too, and compare both. [stage 2]"""
    log_gradient_shares: bool = False
    """Log each loss's share of the gradient. It costs one more backward pass for each loss at every logged step, and
    with several processes a sum of its gradient over them. [stage 2]"""

    _one_or_several = field_validator("cache", mode="before")(check_one_or_several)

    def check_one_cache(self) -> CacheConfig:
        """Return the store of a command that works on one. Raises `ConfigError` if the config names several."""
        if self.cache is None:
            raise ConfigError(
                f"this works on one store, but the config names {len(self.caches or ())} (`caches`); give it a "
                "config with `cache`, such as by the overrides caches=null cache.path=STORE"
            )
        return self.cache

    @property
    def one_cache(self) -> CacheConfig:
        """The one store of the config; see `check_one_cache`."""
        return self.check_one_cache()

    def all_caches(self) -> Sequence[CacheConfig]:
        """Return the stores that stage 2 reads: `caches`, or the one `cache`."""
        return self.caches or [self.one_cache]

    @field_validator("train")
    @classmethod
    def _known_training_arguments(cls, train: dict[str, Any]) -> dict[str, Any]:
        return checked_training_arguments(train)

    @model_validator(mode="before")
    @classmethod
    def _a_twig_has_no_student(cls, values: Any) -> Any:
        return with_base_for_student(values)

    @model_validator(mode="after")
    def _sections_go_together(self) -> Config:
        check_consistent(self)
        return self


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, suggested_layer: int | None = None
) -> Config:
    """Read a YAML config, apply `key.sub=value` overrides (values are YAML), and check all of it.

    `suggested_layer` is used where a layer is `suggested`; by default the one that was measured. Raises `ConfigError`
    with one sentence for each problem.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config {file}: no such file; give --config a YAML file such as configs/demo.yaml")
    try:
        values: Any = read_yaml(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config {file}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {file}: expected a mapping of sections, found {type(values).__name__}")
    return _checked(cast(dict[str, Any], values), overrides, where=str(file), suggested_layer=suggested_layer)


def overridden(config: Config, overrides: Sequence[str], *, where: str) -> Config:
    """Return a config with overrides applied. Raises `ConfigError` that names the config as `where`."""
    return _checked(config.model_dump(mode="json"), overrides, where=where)


def _checked(
    values: dict[str, Any], overrides: Sequence[str], *, where: str, suggested_layer: int | None = None
) -> Config:
    for override in overrides:
        _apply_override(values, override)
    values = with_suggested_layers(values, suggested_layer)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(_sentence(detail) for detail in error.errors())
        raise ConfigError(f"config {where}:\n{problems}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key of nested `values`, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key=value, such as train.learning_rate=1e-3")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        inner: Any = {} if place.get(section) is None else place[section]
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        place[section] = place = cast(dict[str, Any], inner)
    try:
        place[last] = read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"override {override!r}: the value is not readable as YAML: {error}") from error


def _sentence(detail: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as a line: the key, what is wrong, and the known name nearest to it."""
    where = [str(part) for part in detail["loc"]]
    key = ".".join(where)
    if detail["type"] == "extra_forbidden":
        known = _known_fields(where[:-1])
        return f"  {key}: unknown key{did_you_mean(where[-1], known)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return f"  {key}: missing; the config must set it"
    shown = "" if detail["type"] == "value_error" else f", found {detail['input']!r}"
    return f"  {key + ': ' if key and not message.startswith(key + '.') else ''}{message}{shown}"


def _known_fields(where: Sequence[str]) -> list[str]:
    """Return the field names of the section at a path."""
    section: Any = Config
    for part in where:
        if part in section.model_fields:  # else a place in a list
            section = section.model_fields[part].annotation
            while not hasattr(section, "model_fields"):  # of `list[Section] | None` and the like the section
                section = get_args(section)[0]
    return list(section.model_fields)


def labels_only(config: Config) -> Config:
    """Return the same experiment without its teacher. Raises `ConfigError` if `losses.supervised` is null."""
    if config.losses.active().get("supervised") is None:
        raise ConfigError(
            "losses.supervised is null, but `baseline: true` compares with a student of labels alone; "
            "give it a weight, 0 for none, or set baseline: false"
        )
    losses = LossesConfig.model_validate({"supervised": config.losses.active()["supervised"]})
    return config.model_copy(update={"losses": losses, "baseline": False})


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that loads back to the same config."""
    return write_yaml(config.model_dump(mode="json"))
