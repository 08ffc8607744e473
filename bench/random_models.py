"""MobileVLM V2 with random weights, and shards of made-up samples: shapes are real, values are not."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.data.packing import pack
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM

# A tower's share of the work is that of the full size: about 8% of the teacher's at 300 positions.
SMALL_TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 2}
FULL_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}

TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _language_model(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads,
    }  # fmt: skip


MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "teacher"): {**_language_model(64, 96, 2, 2), "vision_config": TINY_TOWER},  # for tests
    ("tiny", "student"): {**_language_model(32, 64, 2, 2), "vision_config": TINY_TOWER},
    ("small", "teacher"): {**_language_model(256, 688, 32, 8), "vision_config": SMALL_TOWER},
    ("small", "student"): {**_language_model(192, 512, 12, 6), "vision_config": SMALL_TOWER},
    # What two CPU cores can hold four of: full widths, fewer layers. A student's head weighs three times too much.
    ("wide", "teacher"): {**_language_model(4096, 11008, 8, 32), "vision_config": FULL_TOWER},
    ("wide", "student"): {**_language_model(2048, 5632, 6, 16), "vision_config": FULL_TOWER},
    ("full", "teacher"): {**_language_model(4096, 11008, 32, 32), "vision_config": FULL_TOWER},  # 7B
    ("full", "student"): {**_language_model(2048, 5632, 24, 16), "vision_config": FULL_TOWER},  # 1.7B
}
IMAGE_SIZE, PATCH_SIZE, VOCABULARY = 336, 14, 32000


def compute_dtype(size: str) -> str:
    """What a model of that size computes in; float16 is slow on a CPU."""
    if size not in ("wide", "full"):
        return "float32"
    return "float16" if torch.cuda.is_available() else "bfloat16"


def write_model(folder: Path, size: str, role: str) -> Path:
    """A checkpoint in the published layout, in the dtype that it is computed in."""
    settings = MODELS[size, role]
    tower = {
        **settings["vision_config"],
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 64,
    }
    config = MobileVLMConfig(**settings | {
        "vision_config": tower, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "pad_token_id": 0,
        "mm_projector_grid": 12,
    })  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, compute_dtype(size)))  # 7B weights fit in memory once, not twice
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = MobileVLMForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None, "`make setup` installs the tokenizer's package"
    shutil.copy(Path(spec.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


def write_shard(folder: Path, *, samples: int, tokens: int, shards: int = 1, seed: int = 0) -> Path:
    """The first of the shards: JPEGs of 640 x 480, one a sample, and conversations of about so many positions."""
    random = np.random.default_rng(seed)
    images, records = folder / "images", []
    images.mkdir(parents=True)
    for number in range(samples):
        pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (images / f"{number}.jpg").write_bytes(file.getvalue())
        words = random.choice(WORDS, size=max(8, tokens - 144 - 50))  # a token each, about
        question, answer = " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
        records.append({"id": f"s{number:05d}", "image": f"{number}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})  # fmt: skip
    annotations = folder / "samples.json"
    annotations.write_text(json.dumps(records))
    pack(annotations, folder / "shards", image_folder=images, samples_per_shard=samples // shards)
    return min((folder / "shards").glob("*.tar"))


WORDS = [
    "the",
    "a",
    "red",
    "green",
    "house",
    "tree",
    "car",
    "man",
    "is",
    "in",
    "on",
    "of",
    "and",
    "with",
    "left",
]
