"""Config, processor and special tokens of tiny families that are not let in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_families
import tiny_family_parts as parts
import tiny_tokenizers
import transformers as T

SIGLIP = {**parts.TOWER, "model_type": "siglip_vision_model", "image_size": parts.TILE, "patch_size": 4}
SQUARE = {"height": 24, "width": 24}


def qwen2_vl(size: parts.Sizes) -> parts.Parts:
    """Its projector lies in the tower, and nothing else differs from the conventions."""
    head = size.width // size.text["num_attention_heads"]
    tower = {"depth": 2, "embed_dim": 16, "hidden_size": size.width, "num_heads": 2, "patch_size": 4}
    config = T.Qwen2VLConfig(
        text_config=parts._with_mrope(size.text, head), vision_config=tower, **parts._qwen(size)
    )
    return parts.Parts(config, T.Qwen2VLImageProcessorPil(**parts._qwen_images()))


def idefics2(size: parts.Sizes) -> parts.Parts:
    """Its processor does not say which text stands for an image."""
    perceiver = {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "num_key_value_heads": 1,
    }
    config = T.Idefics2Config(
        text_config=T.MistralConfig(**size.text),
        vision_config={**parts.TOWER, "image_size": parts.TILE, "patch_size": 4},
        perceiver_config={**perceiver, "resampler_head_dim": 8, "hidden_size": size.width},
        image_token_id=size.image,
    )
    sizes = {"shortest_edge": 12, "longest_edge": parts.TILE}
    return parts.Parts(config, T.Idefics2ImageProcessorPil(size=sizes), {"image_seq_len": 4})


def blip_2(size: parts.Sizes) -> parts.Parts:
    """Its decoder has no list of layers."""
    text = {name: size.text[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")}
    config = T.Blip2Config(
        text_config={
            "model_type": "opt",
            **text,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "word_embed_proj_dim": 32,
        },
        vision_config={**parts.TOWER, "image_size": parts.TILE, "patch_size": 4},
        qformer_config={**parts.TOWER, "encoder_hidden_size": 16, "vocab_size": size.text["vocab_size"]},
        num_query_tokens=4,
        image_token_index=size.image,
        image_text_hidden_size=16,
    )
    images = T.BlipImageProcessorPil(size={"height": parts.TILE, "width": parts.TILE})
    return parts.Parts(config, images, {"num_query_tokens": 4})


def deepseek_vl(size: parts.Sizes) -> parts.Parts:
    """Its model gives no image features."""
    config = T.DeepseekVLConfig(
        text_config=T.LlamaConfig(**size.text),
        vision_config={**SIGLIP, "vision_use_head": False},
        image_token_id=size.image,
    )
    images = T.DeepseekVLImageProcessorPil(size={"height": parts.TILE, "width": parts.TILE}, min_size=4)
    return parts.Parts(config, images, {"num_image_tokens": 16})


def qwen3_vl_moe(size: parts.Sizes) -> parts.Parts:
    """Its experts are transposed when they are loaded."""
    text = parts._with_mrope(size.with_heads, size.with_heads["head_dim"])
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    tower = {**parts.QWEN_TOWER, "out_hidden_size": size.width, "num_position_embeddings": 16}
    config = T.Qwen3VLMoeConfig(
        text_config={**text, **experts},
        vision_config={**tower, "deepstack_visual_indexes": [0]},
        **parts._qwen(size),
    )
    return parts.Parts(config, T.Qwen2VLImageProcessorPil(**parts._qwen_images()))


def video_llava(size: parts.Sizes) -> parts.Parts:
    """Its processor has the video part before the tokenizer."""
    config = T.VideoLlavaConfig(
        text_config=T.LlamaConfig(**size.text),
        vision_config=T.CLIPVisionConfig(**parts.TOWER, image_size=24, patch_size=6),
        image_token_index=size.image,
        video_token_index=size.of["<video>"],
        image_seq_length=16,
    )
    images = {
        "image_processor_type": "VideoLlavaImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_size": SQUARE,
    }
    return parts.Parts(config, images, parts._clip_features())


PARTS: dict[str, Callable[[parts.Sizes], parts.Parts]] = {
    "qwen2_vl": qwen2_vl,
    "idefics2": idefics2,
    "blip-2": blip_2,
    "deepseek_vl": deepseek_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "video_llava": video_llava,
}
LIKE = {
    "qwen2_vl": "qwen2_5_vl",
    "qwen3_vl_moe": "qwen3_vl",
}  # others are like LLaVA


def write_checkpoint(family: str, folder: Path) -> Path:
    """Write a tiny checkpoint of a family that is not let in, with tokens and template of one that is."""
    like = LIKE.get(family, "llava")
    known = tiny_tokenizers.SPECIAL_TOKENS[like]
    named = {"image_token": known.image} if family == "deepseek_vl" else known.named
    special = replace(known, named=named, others=(*known.others, "<video>"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_families.PARTS, family, PARTS[family])
        patch.setitem(tiny_tokenizers.SPECIAL_TOKENS, family, special)
        tiny_families.write_checkpoint(family, folder)
    if (template := tiny_families.TEMPLATES / f"{like}.jinja").is_file():
        shutil.copy(template, folder / "chat_template.jinja")
    return folder
