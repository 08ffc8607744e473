"""The settings of a twig, and what they ask of the rest of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pipeline.config.model_settings import DType, LoraConfig, StudentConfig
from pipeline.errors import ConfigError
from pipeline.losses.losses import LOSSES
from pipeline.settings import Section

OWN_FIRST_WEIGHTS = ("copy", "random")


class TwigConfig(Section):
    """A twig (TwigVLM, arXiv 2503.14075): a few layers on the base's first ones, in place of a student.

    The base is the teacher, and the store holds its hidden states. `alignkd twig train` trains it.
    """

    attach_layer: int = Field(default=2, ge=0)
    """Base layers that run before the twig (K). `targets.hidden_states.layer` must be the same.
    [layers; stage 2; store, run]"""
    num_layers: int = Field(default=3, ge=1)
    """Layers of the twig (T). [layers; stage 2; run]"""
    wipe_layer: int | None = Field(default=None, ge=1)
    """Base layers that see vision tokens when it answers (Kf), saved with it; null: three quarters of all.
    [layers; stage 2; run]"""
    keep: float | None = Field(default=None, gt=0, le=1)
    """Share of the vision tokens that it will be asked to keep, on average over the layers. The training only checks
    that it is possible. [share; stage 2]"""
    pruning_head: bool = Field(default=False, exclude_if=lambda is_on: not is_on)
    """Gives it a head of its own for the scores of vision tokens (TwigVLM++), which `losses.query_attention` trains;
    false: the attention of its last layer. [stage 2; run]"""
    draft_vocabulary: int | None = Field(default=None, ge=1, exclude_if=lambda number: number is None)
    """Drafts only the tokens that are most frequent as labels, by their rows of the head; null: all. A head is up to
    half of a small model's draft. [tokens; stage 2; run]"""
    first_weights: str = "copy"
    """`copy` begins with base layers K to K+T-1, final norm and head; `random` reads no weight of the base; anything
    else is the folder of a trained twig of the same base and place. [stage 2; run]"""
    dtype: DType = "float32"
    """Dtype of its weights. [stage 2; run]"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time. [stage 2; run]"""
    lora: LoraConfig | None = None

    def wipe_layer_of(self, num_base_layers: int) -> int:
        """Return Kf for a base of so many layers: by default the paper's 24 of 32, in proportion."""
        if self.wipe_layer is not None:
            return self.wipe_layer
        return max(3 * num_base_layers // 4, self.attach_layer + 1)


def with_base_for_student(values: Any) -> Any:
    """Return a config's values with the teacher as the student, which preparation reads, if there is a twig alone."""
    if not isinstance(values, Mapping) or values.get("twig") is None or values.get("student") is not None:
        return values
    teacher = values.get("teacher")
    if not isinstance(teacher, Mapping) or "model" not in teacher:
        return values  # the teacher's own message says what is missing
    return {**values, "student": {"model": teacher["model"]}}


def check_twig(config: Any) -> None:
    """Raise `ValueError` unless the rest of a config with a `twig` section is one that a twig can be trained with."""
    twig: TwigConfig = config.twig
    if config.student != StudentConfig(
        model=config.teacher.model, patch_feature_cache_bytes=config.student.patch_feature_cache_bytes
    ):
        raise ValueError(
            "student: set beside `twig`, which is trained in place of a student; leave the section out (its dtype, "
            "lora and gradient_checkpointing are twig.*), or remove `twig` to train a student"
        )
    if config.baseline:
        raise ValueError(
            "baseline: true trains a student without its teacher, but a twig has none; set it to false"
        )
    if (hidden := config.targets.hidden_states) is None:
        raise ValueError(
            "twig needs the target 'hidden_states', which the config does not capture; add "
            f"`targets.hidden_states: {{layer: {twig.attach_layer}}}`"
        )
    if hidden.layer != twig.attach_layer:
        raise ValueError(
            f"twig.attach_layer is {twig.attach_layer}, but targets.hidden_states.layer is {hidden.layer}; a twig "
            "continues the hidden states of the layer that it is attached to: set both to one number"
        )
    for name in config.losses.active():
        if LOSSES[name].only == "student":
            raise ValueError(
                f"losses.{name} compares {' and '.join(LOSSES[name].targets)} with what is inside a student, which a "
                f"twig does not have; set losses.{name}: null"
            )
    if config.losses.query_attention and not twig.pruning_head:
        raise ValueError(
            "losses.query_attention trains the pruning head of a twig, which has none; set twig.pruning_head: true, "
            "or remove the loss"
        )
    if config.losses.policy:
        _check_policy(config)
    elif twig.pruning_head and not config.losses.query_attention:
        raise ValueError(
            "twig.pruning_head: true, but nothing trains it; add `losses.query_attention: {}` and a target "
            "`query_attention` of a layer that looks at the image, or set it to false"
        )
    if not config.losses.active():
        raise ValueError("losses: none is left to train the twig with; give losses.supervised a weight")


def _check_policy(config: Any) -> None:
    """Raise `ValueError` unless the rest of a config fits reinforcement learning of the pruning head alone."""
    twig: TwigConfig = config.twig
    if not twig.pruning_head or twig.first_weights in OWN_FIRST_WEIGHTS:
        raise ValueError(
            "losses.policy continues the pruning head of a trained twig; set twig.pruning_head: true and "
            "twig.first_weights to the twig's folder"
        )
    if twig.lora is not None:
        raise ValueError("losses.policy trains the pruning head alone; remove twig.lora")
    if others := set(config.losses.active()) - {"policy", "query_attention"}:
        raise ValueError(
            f"losses.{min(others)} trains what losses.policy leaves as it is; set it to null (losses.query_attention "
            "may stay, to keep the scores near the base's attention)"
        )
    if config.losses.policy.patience is not None and not config.train.get("load_best_model_at_end"):
        raise ValueError(
            "losses.policy.patience stops after held-out losses that are no better; set data.held_out_shards, "
            "train.eval_strategy and train.load_best_model_at_end: true, or set it to null"
        )


def check_has_student(config: Any) -> None:
    """Raise `ConfigError` if a config trains a twig."""
    if config.twig is not None:
        raise ConfigError(
            "the config has a `twig` section, which takes the place of a student; train it with `alignkd twig "
            "train`, or name a student and remove `twig` to distil one"
        )


def check_has_twig(config: Any) -> TwigConfig:
    """Return the settings of a config's twig. Raises `ConfigError` if it trains a student."""
    if config.twig is None:
        raise ConfigError(
            "the config has no `twig` section; add one, such as `twig: {attach_layer: 2, num_layers: 3}`, or train "
            "its student with `alignkd distill`"
        )
    return config.twig
