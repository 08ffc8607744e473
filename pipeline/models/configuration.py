"""MobileVLM V2's config: the published flat file, and the geometry of the vision tower that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig

from pipeline.errors import ConfigError
from pipeline.models.broken_files import named_if_broken
from pipeline.models.efficientnet import EfficientNetLiteConfig

# What `vision_tower_type` may say, and the class of that tower's geometry.
TowerConfig = CLIPVisionConfig | EfficientNetLiteConfig
TOWER_TYPES: dict[str, type[CLIPVisionConfig] | type[EfficientNetLiteConfig]] = {
    "clip": CLIPVisionConfig,
    "efficientnet_lite": EfficientNetLiteConfig,
}

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
    """A flat LLaMA config plus the `mm_*` fields of the published files and two optional ones.

    `vision_config` is the tower's geometry (absent: that of the tower which `mm_vision_tower` names), of the
    kind that `vision_tower_type` says;
    `mm_projector_grid` is the side of the vision-token grid (absent: 12, hence 144 vision tokens).
    """

    model_type = "mobilevlm"
    sub_configs = {"vision_config": CLIPVisionConfig}  # pyright: ignore[reportAssignmentType]

    vision_tower_type: str = (
        "clip"  # before the geometry: fields are set in this order, and it says what that is
    )
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
        self.vision_config = resolve_vision_config(
            self.vision_config, self.mm_vision_tower, tower_type=self.vision_tower_type
        )
        self._check_select_layer()
        self._check_pad_token()
        if (quantised := kwargs.get("quantization_config")) is not None:
            raise ConfigError(
                f"quantization_config: quantised weights are not read, found {quantised}; use the unquantised "
                "checkpoint, or remove the field if the weights are those of one"
            )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # Set later as the dict of a JSON file, it must be what it is when it comes with the file.
        if name == "vision_config" and isinstance(value, dict):
            value = resolve_vision_config(value, None, tower_type=self.vision_tower_type)
        super().__setattr__(name, value)

    def _check_select_layer(self) -> None:
        if not isinstance(self.tower, CLIPVisionConfig):
            return  # an EfficientNet is taken whole
        num_states = self.tower.num_hidden_layers + 1
        if not -num_states <= self.mm_vision_select_layer < num_states:
            raise ConfigError(
                f"mm_vision_select_layer: the vision tower has {num_states - 1} layers, "
                f"found {self.mm_vision_select_layer}"
            )

    def _check_pad_token(self) -> None:
        pad = self.pad_token_id
        if pad is not None and not -self.vocab_size <= pad < self.vocab_size:
            raise ConfigError(
                f"pad_token_id: {pad} is outside the vocabulary, vocab_size is {self.vocab_size}; set it to null: "
                "padding is masked here, whatever its token"
            )

    @property
    def tower(self) -> TowerConfig:
        """The vision tower's geometry."""
        assert isinstance(self.vision_config, TowerConfig)
        return self.vision_config

    @property
    def num_vision_tokens(self) -> int:
        """N: how many vision tokens stand for one image."""
        return self.mm_projector_grid**2

    def to_dict(self) -> dict[str, Any]:
        """As transformers writes it, plus the old names of the rotary fields that the original code reads."""
        fields = super().to_dict()
        if isinstance(self.vision_config, TowerConfig):
            fields["mm_hidden_size"] = self.vision_config.hidden_size
        rope = self.rope_parameters or {}
        fields["rope_theta"] = rope.get("rope_theta", 10000.0)
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else dict(rope)
        return fields


def read_config(folder: Path) -> MobileVLMConfig:
    """The config of a checkpoint folder. Raises `ConfigError` naming the file.

    transformers takes a folder without config.json for one of nothing but defaults: a model of 7B, all random.
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


def resolve_vision_config(
    given: dict | TowerConfig | None, tower: str | None, *, tower_type: str = "clip"
) -> TowerConfig:
    """The tower's geometry: as given, else a local CLIP folder's, else that of a tower known by name."""
    if tower_type not in TOWER_TYPES:
        raise ConfigError(
            f"vision_tower_type: unknown tower {tower_type!r}; known are {', '.join(sorted(TOWER_TYPES))}"
        )
    if isinstance(given, TowerConfig):
        return given
    if given is None and tower and (config_file := Path(tower) / "config.json").is_file():
        described = json.loads(config_file.read_text())
        given = described.get("vision_config", described)
    if given is None:
        given = KNOWN_TOWERS.get(tower or "")
    if given is None:
        check_tower_is_here(tower)
        raise ConfigError(
            f"the config describes no vision tower: mm_vision_tower is {tower!r}, known names are "
            f"{sorted(KNOWN_TOWERS)}; add the tower's geometry as `vision_config`"
        )
    if not isinstance(given, dict):
        raise ConfigError(f"vision_config: expected the tower's geometry, found {given!r}")
    return TOWER_TYPES[tower_type](
        **{k: v for k, v in given.items() if k not in ("model_type", "transformers_version")}
    )


def check_tower_is_here(tower: str | None) -> None:
    """Raise `ConfigError` for a tower that is named by a path which leads nowhere."""
    if tower is None or Path(tower).is_dir():
        return
    if tower.startswith(("/", ".", "~")) or tower.count("/") > 1 or "\\" in tower:
        raise ConfigError(
            f"mm_vision_tower: {tower!r} is no folder here, but perhaps on the machine that wrote the config; set it "
            f"to where the tower is, or to its name, such as {' or '.join(sorted(KNOWN_TOWERS))}"
        )


AutoConfig.register("mobilevlm", MobileVLMConfig)
