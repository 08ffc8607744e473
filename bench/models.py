"""MobileVLM V2 with random weights, and shards of made-up samples: shapes are real, values are not."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pipeline.config.config import Config
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.packing.pack import pack

IMAGE_SIZE, PATCH_SIZE, VOCABULARY = 336, 14, 32000
TARGETS = {"attention": {"layers": [0]}, "vision": {}, "logits": {"top_k": 32}}
WORDS = ["the", "a", "red", "green", "house", "tree", "car", "man", "is", "in", "on", "of"]  # a token each
Size = Literal["tiny", "small", "wide", "full"]


def _layers(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads}  # fmt: skip


# A tower's share of the work is that of the full size: about 8% of the teacher's at 300 positions.
_TINY, _SMALL, _FULL = _layers(32, 64, 2, 2), _layers(128, 512, 6, 2), _layers(1024, 4096, 24, 16)
MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny", "teacher"): {**_layers(64, 96, 2, 2), "vision_config": _TINY},  # for tests
    ("tiny", "student"): {**_layers(32, 64, 2, 2), "vision_config": _TINY},
    ("small", "teacher"): {**_layers(256, 688, 32, 8), "vision_config": _SMALL},
    ("small", "student"): {**_layers(192, 512, 12, 6), "vision_config": _SMALL},
    # Full widths, fewer layers: two CPU cores can hold four of these. A student's head weighs three times too much.
    ("wide", "teacher"): {**_layers(4096, 11008, 8, 32), "vision_config": _FULL},
    ("wide", "student"): {**_layers(2048, 5632, 6, 16), "vision_config": _FULL},
    ("full", "teacher"): {**_layers(4096, 11008, 32, 32), "vision_config": _FULL},  # 7B
    ("full", "student"): {**_layers(2048, 5632, 24, 16), "vision_config": _FULL},  # 1.7B
}


@dataclass(frozen=True)
class Case:
    """What a bench runs on: models of a size, and samples of about so many positions; all lies in `folder`."""

    size: Size
    tokens: int
    samples: int
    batch_size: int
    folder: Path
    workers: int = 2  # that load data, in stage 2


def compute_dtype(size: str) -> str:
    """What a model of that size computes in; float16 is slow on a CPU."""
    if size not in ("wide", "full"):
        return "float32"
    return "float16" if torch.cuda.is_available() else "bfloat16"


def config_of(
    case: Case,
    losses: Mapping[str, Any] | None = None,
    *,
    targets: Collection[str] = tuple(TARGETS),
    store: str = "store",
) -> Config:
    """The config of both stages, for models and shards below the case's folder."""
    folder, dtype = case.folder, compute_dtype(case.size)
    return Config.model_validate({
        "output_dir": str(folder / "out"),
        "teacher": {"model": str(folder / "teacher"), "batch_size": case.batch_size, "dtype": dtype},
        "student": {"model": str(folder / "student"), "dtype": "float32" if dtype == "float32" else "bfloat16"},
        "data": {"shards": str(folder / "data" / "shards")},
        "cache": {"path": str(folder / store)},
        "targets": {name: TARGETS[name] for name in targets},
        "train": {"per_device_train_batch_size": case.batch_size, "report_to": "none", "max_steps": 1},
        **({} if losses is None else {"losses": losses}),
    })  # fmt: skip


def write_inputs(case: Case, *roles: str) -> None:
    """Write the models of these roles, and a shard."""
    for role in roles:
        write_model(case.folder / role, MODELS[case.size, role], compute_dtype(case.size))
    write_shard(case.folder / "data", samples=case.samples, tokens=case.tokens)


def model_config(settings: Mapping[str, Any]) -> MobileVLMConfig:
    """The whole config of a row of `MODELS`."""
    tower = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 64}
    return MobileVLMConfig(**settings | {
        "vision_config": settings["vision_config"] | tower,
        "num_key_value_heads": settings["num_attention_heads"],
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "pad_token_id": 0, "mm_projector_grid": 12,
    })  # fmt: skip


def write_model(folder: Path, settings: Mapping[str, Any], dtype: str) -> None:
    """Write a checkpoint with random weights in the published layout."""
    config = model_config(settings)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))  # 7B weights fit in memory once, not twice
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = MobileVLMForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None, "`make setup` installs the tokenizer's package"
    shutil.copy(Path(spec.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")


def write_shard(folder: Path, *, samples: int, tokens: int) -> None:
    """Write a shard of samples with one JPEG of 640 x 480 and a conversation of about so many positions each."""
    random = np.random.default_rng(0)
    images, records = folder / "images", []
    images.mkdir(parents=True)
    for number in range(samples):
        (images / f"{number}.jpg").write_bytes(_picture(random))
        words = random.choice(WORDS, size=max(8, tokens - 144 - 50))
        question, answer = (" ".join(half) for half in np.array_split(words, 2))
        records.append({"id": f"s{number:05d}", "image": f"{number}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})  # fmt: skip
    annotations = folder / "samples.json"
    annotations.write_text(json.dumps(records))
    pack(annotations, folder / "shards", image_folder=images, samples_per_shard=samples)


def _picture(random: np.random.Generator) -> bytes:
    pixels = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
