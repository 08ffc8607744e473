"""Config, image processor and processor settings of each tiny family, with the field names of the published files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers as T
from tiny_tokenizers import SPECIAL_TOKENS
from transformers import PreTrainedTokenizerFast

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
}
TILE = 16  # pixels of a tile's side; patches have 4, so that a tile has 16 patches
ANYRES: list[list[int]] = [[24, 48], [48, 24], [48, 48]]


@dataclass
class Parts:
    """What a checkpoint folder holds beside weights and tokenizer.

    `images` is an image processor, or the fields of one whose class needs torchvision. `processor` are the fields of
    processor_config.json.
    """

    config: T.PreTrainedConfig
    images: Any
    processor: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sizes:
    """The fields of a text config, and the ids that the config of a family repeats."""

    text: dict[str, Any]
    image: int
    of: dict[str, int]

    @property
    def width(self) -> int:
        return self.text["hidden_size"]

    @property
    def with_heads(self) -> dict[str, Any]:
        """The text fields, with heads of 8 whatever the width."""
        return {"head_dim": 8, **self.text}

    def layer_types(self, *types: str) -> list[str]:
        """The kinds of layers in turn, as many as there are layers."""
        return [types[n % len(types)] for n in range(self.text["num_hidden_layers"])]


def sizes(family: str, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]) -> Sizes:
    """Return the text config's fields for a tokenizer; `changes` replace or add fields."""
    special = SPECIAL_TOKENS[family]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special.all()}
    vocabulary = 64 * (len(tokenizer) // 64 + 1)  # larger than the tokenizer's, as published ones are
    own = {
        "vocab_size": vocabulary,
        "pad_token_id": ids[special.pad],
        "eos_token_id": ids[special.eos],
        "bos_token_id": ids[special.bos or special.pad],  # Qwen's configs name the padding
    }
    return Sizes({**TEXT, **own, **changes}, ids[special.image], ids)


def llava(size: Sizes) -> Parts:
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**size.text),
        vision_config=T.CLIPVisionConfig(**TOWER, image_size=24, patch_size=6),
        image_token_index=size.image,
        image_seq_length=16,
    )
    square = {"height": 24, "width": 24}
    images = T.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)
    return Parts(config, images, _clip_features())


def llava_next(size: Sizes) -> Parts:
    config = T.LlavaNextConfig(
        text_config=T.MistralConfig(**size.text),
        vision_config=T.CLIPVisionConfig(**TOWER, image_size=24, patch_size=6),
        image_token_index=size.image,
        image_seq_length=16,
        image_grid_pinpoints=ANYRES,
    )
    square = {"height": 24, "width": 24}
    images = T.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=square, image_grid_pinpoints=ANYRES
    )
    return Parts(config, images, _clip_features())


def _clip_features() -> dict[str, Any]:
    return {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 6,
        "vision_feature_select_strategy": "default",
    }


def internvl(size: Sizes) -> Parts:
    tower = {"model_type": "internvl_vision", **TOWER, "image_size": [TILE, TILE], "patch_size": [4, 4]}
    config = T.InternVLConfig(
        text_config=T.Qwen2Config(**size.text),
        vision_config=tower,
        image_token_id=size.image,
        image_seq_length=4,
    )
    square = {"height": TILE, "width": TILE}
    images = T.GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=4)
    return Parts(config, images, {"image_seq_length": 4})


def smolvlm(size: Sizes) -> Parts:
    images = T.SmolVLMImageProcessorPil(**_splitting())
    return Parts(T.SmolVLMConfig(**_idefics(size)), images, {"image_seq_len": 4})


def idefics3(size: Sizes) -> Parts:
    images = T.Idefics3ImageProcessorPil(**_splitting())
    return Parts(T.Idefics3Config(**_idefics(size)), images, {"image_seq_len": 4})


def _idefics(size: Sizes) -> dict[str, Any]:
    return {
        "text_config": T.LlamaConfig(**size.text),
        "vision_config": {**TOWER, "image_size": TILE, "patch_size": 4},
        "image_token_id": size.image,
        "pad_token_id": size.text["pad_token_id"],
        "scale_factor": 2,
    }


def _splitting() -> dict[str, Any]:
    return {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}


def qwen2_5_vl(size: Sizes) -> Parts:
    tower = {**QWEN_TOWER, "out_hidden_size": size.width, "window_size": 16, "fullatt_block_indexes": [1]}
    head = size.width // size.text["num_attention_heads"]
    config = T.Qwen2_5_VLConfig(text_config=_with_mrope(size.text, head), vision_config=tower, **_qwen(size))
    return Parts(config, T.Qwen2VLImageProcessorPil(**_qwen_images()))


def qwen3_vl(size: Sizes) -> Parts:
    tower = {
        **QWEN_TOWER,
        "depth": 3,
        "out_hidden_size": size.width,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _with_mrope(size.with_heads, size.with_heads["head_dim"])
    config = T.Qwen3VLConfig(text_config=text, vision_config=tower, **_qwen(size))
    return Parts(
        config, T.Qwen2VLImageProcessorPil(**_qwen_images(), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )


def _with_mrope(text: dict[str, Any], head: int) -> dict[str, Any]:
    third = head // 6
    section = [head // 2 - 2 * third, third, third]
    return {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}}


def _qwen(size: Sizes) -> dict[str, Any]:
    return {
        "image_token_id": size.image,
        "video_token_id": size.of["<|video_pad|>"],
        "vision_start_token_id": size.of["<|vision_start|>"],
        "vision_end_token_id": size.of["<|vision_end|>"],
    }


def _qwen_images() -> dict[str, Any]:
    return {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}


def gemma3(size: Sizes) -> Parts:
    text = T.Gemma3TextConfig(
        **size.with_heads,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=size.layer_types("sliding_attention", "sliding_attention", "full_attention"),
    )
    config = T.Gemma3Config(
        text_config=text,
        vision_config=T.SiglipVisionConfig(**TOWER, image_size=TILE, patch_size=4),
        image_token_index=size.image,
        boi_token_index=size.of["<start_of_image>"],
        eoi_token_index=size.of["<end_of_image>"],
        mm_tokens_per_image=4,
    )
    return Parts(
        config, T.Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}), {"image_seq_length": 4}
    )


def paligemma(size: Sizes) -> Parts:
    config = T.PaliGemmaConfig(
        text_config=T.GemmaConfig(**size.with_heads),
        vision_config=T.SiglipVisionConfig(
            **TOWER, image_size=TILE, patch_size=4, projection_dim=size.width, vision_use_head=False
        ),
        image_token_index=size.image,
        projection_dim=size.width,
        hidden_size=size.width,
        vocab_size=size.text["vocab_size"],
    )
    images = T.SiglipImageProcessorPil(size={"height": TILE, "width": TILE}, image_seq_length=16)
    return Parts(config, images)


def lfm2_vl(size: Sizes) -> Parts:
    """Its image processor needs torchvision: only its published fields are written."""
    text = T.Lfm2Config(
        **size.text,
        layer_types=size.layer_types("conv", "conv", "full_attention"),
        block_ff_dim=64,
        block_auto_adjust_ff_dim=False,
    )
    tower = {"model_type": "siglip2_vision_model", **TOWER, "num_patches": 16, "patch_size": 4}
    config = T.Lfm2VlConfig(
        text_config=text,
        vision_config={**tower, "vision_use_head": False},
        image_token_id=size.image,
        projector_hidden_size=32,
        downsample_factor=2,
    )
    images = {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        "do_image_splitting": True,
        "downsample_factor": 2,
        "encoder_patch_size": 4,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "max_image_tokens": 16,
        "min_image_tokens": 4,
        "max_num_patches": 64,
        "max_tiles": 4,
        "min_tiles": 2,
        "tile_size": TILE,
        "use_thumbnail": True,
    }
    return Parts(config, images)
