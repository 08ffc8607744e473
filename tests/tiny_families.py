"""Tiny random checkpoints of published model families, in the files that the hub has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_experiment
import small_models
import tiny_family_parts as parts
import torch
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from pipeline.studies.demo import write_tokenizer

TEMPLATES = Path(__file__).parent / "fixtures" / "chat_templates"
PARTS: dict[str, Callable[[parts.Sizes], parts.Parts]] = {
    "llava": parts.llava,
    "llava_next": parts.llava_next,
    "internvl": parts.internvl,
    "smolvlm": parts.smolvlm,
    "idefics3": parts.idefics3,
    "qwen2_5_vl": parts.qwen2_5_vl,
    "qwen3_vl": parts.qwen3_vl,
    "gemma3": parts.gemma3,
    "paligemma": parts.paligemma,
    "lfm2_vl": parts.lfm2_vl,
}
FAMILIES = (*PARTS, "mobilevlm")


def write_checkpoint(family: str, folder: Path, *, seed: int = 0, **size: Any) -> Path:
    """Write a tiny checkpoint of a family and return its folder; `size` replaces fields of the text config.

    Checkpoints of a family have one tokenizer and one image processor, whatever their seed and size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if family == "mobilevlm":
        return _write_mobilevlm(folder, seed, size)
    tokenizer = tiny_tokenizer(family)
    own = PARTS[family](parts.sizes(family, tokenizer, size))
    random_model(own.config, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processor(family, own, folder)
    if (template := TEMPLATES / f"{family}.jinja").is_file():
        shutil.copy(template, folder / "chat_template.jinja")
    return folder


def _write_mobilevlm(folder: Path, seed: int, size: dict[str, Any]) -> Path:
    with torch.random.fork_rng(devices=[]):
        model = small_models.tiny_model(seed=seed, **{"vocab_size": 512, **size})
    model.save_pretrained(folder)
    write_tokenizer(folder, small_experiment.tokenizer_records())
    return folder


def random_model(config: Any, seed: int) -> PreTrainedModel:
    """Build a model whose attention is not uniform.

    One-dimensional weights (norms, biases) get noise around their first values, since a norm's scale is `w` in some
    families and `1 + w` in others. All others are drawn anew, larger than usual.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.2)
            else:
                weight.normal_(std=0.25)
    return model


def _write_processor(family: str, own: parts.Parts, folder: Path) -> None:
    kind = {"processor_class": PROCESSOR_MAPPING_NAMES[family]}
    if isinstance(own.images, dict):
        images = own.images
    else:
        own.images.save_pretrained(folder)
        images = json.loads((folder / "preprocessor_config.json").read_text())
    _write_json(folder / "preprocessor_config.json", images | kind)
    if own.processor:
        _write_json(folder / "processor_config.json", own.processor | kind)


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n")
