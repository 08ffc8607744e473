"""What llama.cpp takes of MobileVLM V2: it asserts the rest, and an assertion ends the whole process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from pipeline.errors import ConfigError
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import MobileVLMConfig

# llama.cpp pools 24 x 24 patches 2 x 2, whatever the file says (tools/mtmd/models/llava.cpp).
PATCHES_A_SIDE = 24
TOKENS_A_SIDE = 12
LAYERS, TOWER_LAYERS = "model.layers.", "model.vision_tower.vision_tower.vision_model.encoder.layers."
OWN_EYES = "export the language model alone (--no-vision) and compute the image embeddings elsewhere"


def check_is_mobilevlm(config: Any, folder: Path) -> MobileVLMConfig:
    """Return the config. Raises `ConfigError` for another family, which llama.cpp's own converter takes."""
    if isinstance(config, MobileVLMConfig):
        return config
    raise ConfigError(
        f"{folder} is of the family {config.model_type!r}; `export gguf` writes MobileVLM V2 alone. Use `export hf`, "
        "and llama.cpp's own convert_hf_to_gguf.py on what it writes"
    )


def check_language_model(config: MobileVLMConfig, folder: Path) -> None:
    """Raise `ConfigError` for a language model that the architecture `llama` of llama.cpp computes otherwise."""
    rope = config.rope_parameters or {}
    head = head_width(config)
    wants = {
        "hidden_act": (config.hidden_act, "silu", config.hidden_act == "silu"),
        "attention_bias": (config.attention_bias, "false", not config.attention_bias),
        "mlp_bias": (config.mlp_bias, "false", not config.mlp_bias),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default",
                                      rope.get("rope_type", "default") == "default"),
        "head_dim": (head, "an even number", head % 2 == 0),
        "num_attention_heads": (config.num_attention_heads, f"a multiple of num_key_value_heads, which is "
                                f"{config.num_key_value_heads}",
                                bool(config.num_key_value_heads)
                                and config.num_attention_heads % config.num_key_value_heads == 0),
    }  # fmt: skip
    _refuse_first(wants, folder, then="it cannot be exported")
    _check_num_layers(config, folder)
    if not (folder / "tokenizer.model").is_file():
        raise ConfigError(
            f"{folder}: no tokenizer.model; llama.cpp's tokenizer is written from the sentencepiece file, so copy it "
            "into the folder"
        )


def _check_num_layers(config: MobileVLMConfig, folder: Path) -> None:
    """Raise `ConfigError` if the weights have layers that the config does not count: they would be left out."""
    names = Checkpoint(str(folder)).names()
    counted = {
        LAYERS: config.num_hidden_layers,
        TOWER_LAYERS: getattr(config.tower, "num_hidden_layers", None),
    }
    for prefix, number in counted.items():
        numbers = [name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)]
        last = max((int(one) for one in numbers if one.isdigit()), default=-1)
        if number is not None and last >= number:
            raise ConfigError(
                f"{folder}: the weights have {last + 1} layers ({prefix}N), config.json says {number}; use the "
                "config.json that belongs to the checkpoint"
            )


def check_vision(config: MobileVLMConfig, folder: Path) -> None:
    """Raise `ConfigError` for a tower or projector that llama.cpp's `ldpv2` aborts on or computes otherwise."""
    tower = config.tower
    if not isinstance(tower, CLIPVisionConfig):
        raise ConfigError(
            f"{folder}: the vision tower is {config.vision_tower_type!r}, llama.cpp takes CLIP here; {OWN_EYES}"
        )
    image, patch = tower.image_size, tower.patch_size
    side = f"{PATCHES_A_SIDE} x {PATCHES_A_SIDE}"
    wants = {
        "vision_config": (f"an image of {image} in patches of {patch}", f"{side} patches, such as 336 in patches of "
                          "14 or 96 in patches of 4", image == PATCHES_A_SIDE * patch),  # pyright: ignore[reportOperatorIssue]
        "mm_projector_grid": (config.mm_projector_grid, TOKENS_A_SIDE, config.mm_projector_grid == TOKENS_A_SIDE),
        "mm_vision_select_feature": (config.mm_vision_select_feature, "patch",
                                     config.mm_vision_select_feature == "patch"),
        "mm_vision_select_layer": (config.mm_vision_select_layer, "a layer behind the first",
                                   selected_layer(config) > 0),
        "vision_config.num_channels": (tower.num_channels, 3, tower.num_channels == 3),
        "vision_config.hidden_act": (tower.hidden_act, "gelu or quick_gelu",
                                     tower.hidden_act in ("gelu", "quick_gelu")),
    }  # fmt: skip
    _refuse_first(wants, folder, then=OWN_EYES)


def selected_layer(config: MobileVLMConfig) -> int:
    """Return how many of the tower's layers run before its features are taken."""
    num_layers: int = config.tower.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue]
    return range(num_layers + 1)[config.mm_vision_select_layer]


def head_width(config: MobileVLMConfig) -> int:
    """Return the width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse_first(wants: dict[str, tuple[Any, Any, bool]], folder: Path, *, then: str) -> None:
    for name, (found, wanted, fits) in wants.items():
        if not fits:
            raise ConfigError(f"{folder}: {name} is {found}, llama.cpp takes {wanted}; {then}")
