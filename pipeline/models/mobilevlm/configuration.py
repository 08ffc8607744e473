"""MobileVLM V2's config: the published flat file, and the geometry of the vision tower that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from pipeline.errors import ConfigError
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.mobilevlm.efficientnet import EfficientNetLiteConfig

# Stands for an image in `input_ids`: outside of every vocabulary, as in the published code.
IMAGE_TOKEN_ID = -200

TowerConfig = CLIPVisionConfig | EfficientNetLiteConfig
# The values of `vision_tower_type`, with the class of that tower's geometry.
TOWER_TYPES = {"clip": CLIPVisionConfig, "efficientnet_lite": EfficientNetLiteConfig}

# Public geometry of the towers that published configs name without describing them.
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
USE_ITS_CONFIG = "use the config.json that belongs to the checkpoint"


class MobileVLMConfig(LlamaConfig):
    """A flat LLaMA config with the `mm_*` fields of the published files, and three fields of our own.

    `vision_tower_type` is the kind of tower. `vision_config` is its geometry (default: that of the tower which
    `mm_vision_tower` names). `mm_projector_grid` is the side of the vision-token grid (12: 144 vision tokens).
    Raises `ConfigError` naming the field that cannot be used.
    """

    model_type = "mobilevlm"
    sub_configs = {"vision_config": CLIPVisionConfig}  # pyright: ignore[reportAssignmentType]

    # Fields are set in this order, and the geometry depends on the type.
    vision_tower_type: str = "clip"
    vision_config: dict | CLIPVisionConfig | EfficientNetLiteConfig | None = None
    mm_vision_tower: str | None = "openai/clip-vit-large-patch14-336"
    mm_hidden_size: int | None = None
    mm_projector_type: str = "ldpnetv2"
    mm_projector_grid: int = 12
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    image_aspect_ratio: str | None = "pad"

    def __post_init__(self, **kwargs):
        if self.mm_projector_type != "ldpnetv2":
            raise ConfigError(
                "mm_projector_type: only 'ldpnetv2' (MobileVLM V2) is supported, "
                f"found {self.mm_projector_type!r}"
            )
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "mm_projector_grid"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a number from 1 on, found {getattr(self, name)}")
        if not isinstance(self.vision_config, TowerConfig):
            self.vision_config = _described_tower(
                self.vision_config, self.mm_vision_tower, self.vision_tower_type
            )
        self._check_select_layer()
        pad, size = self.pad_token_id, self.vocab_size
        if pad is not None and not -size <= pad < size:
            raise ConfigError(
                f"pad_token_id: {pad} is outside the vocabulary, vocab_size is {size}; set it to null: "
                "padding is masked here, whatever its token"
            )
        if (quantised := kwargs.get("quantization_config")) is not None:
            raise ConfigError(
                f"quantization_config: quantised weights are not read, found {quantised}; use the unquantised "
                "checkpoint, or remove the field if the weights are those of one"
            )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # from_pretrained(folder, vision_config={...}) sets the field after __post_init__.
        if name == "vision_config" and isinstance(value, dict):
            value = _described_tower(value, None, self.vision_tower_type)
        super().__setattr__(name, value)

    def _check_select_layer(self) -> None:
        if isinstance(self.tower, CLIPVisionConfig):
            num_layers = self.tower.num_hidden_layers
            if not -num_layers - 1 <= self.mm_vision_select_layer <= num_layers:
                raise ConfigError(
                    f"mm_vision_select_layer: the vision tower has {num_layers} layers, "
                    f"found {self.mm_vision_select_layer}"
                )

    @property
    def tower(self) -> TowerConfig:
        """The vision tower's geometry."""
        assert isinstance(self.vision_config, TowerConfig)
        return self.vision_config

    @property
    def image_token_id(self) -> int:
        """The id that stands for a vision token in `input_ids`; no field, so that saved configs stay as published."""
        return IMAGE_TOKEN_ID

    @property
    def num_vision_tokens(self) -> int:
        """N, the number of vision tokens of an image."""
        return self.mm_projector_grid**2

    def to_dict(self) -> dict[str, Any]:
        """Return transformers' fields, and the old names of the rotary fields that the original code reads."""
        fields = super().to_dict()
        if isinstance(self.vision_config, TowerConfig):
            fields["mm_hidden_size"] = self.vision_config.hidden_size
        rope = self.rope_parameters or {}
        fields["rope_theta"] = rope.get("rope_theta", 10000.0)
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else dict(rope)
        return fields


def read_mobilevlm_config(folder: Path) -> MobileVLMConfig:
    """Return the config of a checkpoint folder. Raises `ConfigError` naming the file.

    The check matters: for a folder without config.json, transformers returns the defaults, a random model of 7B.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; name a folder that holds a MobileVLM V2 checkpoint")
    try:
        with named_if_broken(file, kind="a MobileVLM V2 config", then=USE_ITS_CONFIG):
            return MobileVLMConfig.from_pretrained(folder)
    except ConfigError as error:
        if str(error).startswith(str(file)):
            raise
        raise ConfigError(f"{file}: {error}") from error


def _described_tower(given: Any, name: str | None, tower_type: str) -> TowerConfig:
    """Return a tower's geometry: as given, else from a local CLIP folder, else of a known name."""
    if tower_type not in TOWER_TYPES:
        raise ConfigError(
            f"vision_tower_type: unknown tower {tower_type!r}; known are {', '.join(sorted(TOWER_TYPES))}"
        )
    if given is None and name and (file := Path(name) / "config.json").is_file():
        described = json.loads(file.read_text())
        given = described.get("vision_config", described)
    if given is None:
        given = KNOWN_TOWERS.get(name or "")
    if given is None:
        check_tower_is_here(name)
        raise ConfigError(
            f"the config describes no vision tower: mm_vision_tower is {name!r}, known names are "
            f"{sorted(KNOWN_TOWERS)}; add the tower's geometry as `vision_config`"
        )
    if not isinstance(given, dict):
        raise ConfigError(f"vision_config: expected the tower's geometry, found {given!r}")
    fields = {key: value for key, value in given.items() if key not in ("model_type", "transformers_version")}
    return TOWER_TYPES[tower_type](**fields)


def check_tower_is_here(tower: str | None) -> None:
    """Raise `ConfigError` if a tower is named by a local path that does not exist."""
    if tower is None or Path(tower).is_dir():
        return
    if tower.startswith(("/", ".", "~")) or tower.count("/") > 1 or "\\" in tower:
        raise ConfigError(
            f"mm_vision_tower: {tower!r} is no folder here, but perhaps on the machine that wrote the config; set it "
            f"to where the tower is, or to its name, such as {' or '.join(sorted(KNOWN_TOWERS))}"
        )


AutoConfig.register("mobilevlm", MobileVLMConfig)
