"""Training of the study's teacher from published parts (`python -m pipeline.studies.emoji teacher`).

1. The projector learns to name each cell in the language model's own words (`alignment.py`).
2. Low-rank changes (LoRA) of every layer learn the answers; all questions of an image share one prefix. The
   projector stays as it is: trained together with the layers, its tokens were nearest to the right name for 64% of
   the things in validation scenes, instead of 96%.

Only what was learned is saved; `models.py` adds it to the published parts. Needs the package peft
(`pip install 'alignkd[emoji]'`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports]
from torch import Tensor

from pipeline.data.images import ImagePreprocessor
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.studies.emoji.alignment import align_projector, embed_words, facts_of_scenes
from pipeline.studies.emoji.data import TEACHER_SETS
from pipeline.studies.emoji.scenes import IMAGE_SIZE, all_concepts
from pipeline.studies.shared_prefix import ImageQuestions, group_by_image
from pipeline.studies.training import fit_answers

RANK = 8
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_teacher(
    model: MobileVLMForCausalLM, checkpoint: Path, data: Path, *, align_steps: int, epochs: int
) -> dict[str, Tensor]:
    """Run both steps on the teacher's scenes in `data`; `checkpoint` is the folder of `model` before training."""
    tokenizer = load_tokenizer(checkpoint)
    preprocess = ImagePreprocessor.from_pretrained(checkpoint, aspect_ratio="pad", image_size=IMAGE_SIZE)
    records = [r for name in TEACHER_SETS for r in json.loads((data / f"{name}.json").read_text())]
    asked = group_by_image(records, tokenizer, template="chatml")
    images = (preprocess((data / "images" / item.image).read_bytes()) for item in asked)
    # The tower is frozen: its patch features 'I M W' are computed once for the whole training.
    features = torch.cat([model.get_patch_features(image[None]) for image in images])
    words = embed_words(model, tokenizer, all_concepts())
    align_projector(model, features, facts_of_scenes(), words, num_steps=align_steps)
    return train_answers(model, asked, features, epochs=epochs)


def train_answers(
    model: MobileVLMForCausalLM, asked: list[ImageQuestions], features: Tensor, *, epochs: int
) -> dict[str, Tensor]:
    """Step 2: train LoRA on the answers, and return `learned_of`; `features` 'I M W' in the order of `asked`."""
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS), model)
    generator = torch.Generator().manual_seed(2)
    fit_answers(model, asked, features.__getitem__, batch_size=4, epochs=epochs, generator=generator)
    return learned_of(model)


def learned_of(model: MobileVLMForCausalLM) -> dict[str, Tensor]:
    """Return what was learned, as float16: the projector, and A and B of every changed layer, W + B A."""
    learned = model.model.mm_projector.state_dict(prefix="model.mm_projector.")
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            lora: Any = module  # typed as any module where peft is not installed
            learned[f"{name}.lora_A"] = lora.lora_A["default"].weight
            learned[f"{name}.lora_B"] = lora.lora_B["default"].weight * lora.scaling["default"]
    return {name: value.detach().half().contiguous() for name, value in learned.items()}
