"""Training of the study's teacher (`python -m pipeline.studies.emoji teacher`): published parts, a frozen tower.

1. The projector learns to name each cell in the language model's own words (`alignment.py`).
2. Low-rank changes (LoRA) of every layer learn to answer from its tokens; all questions of an image share one
   prefix. The projector stays as it is: once trained on together with the layers, its tokens were nearest to the
   right name for 64% of the things in validation scenes, instead of 96%.

What was learned is small, and is kept apart from what was published: `models.py` puts the two together. Needs the
package peft (`pip install 'alignkd[emoji]'`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from pipeline.data.images import ImagePreprocessor
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.saved_files import save_tensors
from pipeline.studies.demo_teacher import one_cycle
from pipeline.studies.emoji.alignment import align_projector, embed_words, facts_of_scenes
from pipeline.studies.emoji.concepts import all_concepts
from pipeline.studies.emoji.data import TEACHER_SETS
from pipeline.studies.emoji.scenes import IMAGE_SIZE
from pipeline.studies.shared_prefix import ImageQuestions, answer_loss, group_by_image

RANK = 8
SNAPSHOT_STEPS = 100
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compute_features(
    model: MobileVLMForCausalLM, preprocess: ImagePreprocessor, folder: Path, images: Sequence[str]
) -> Tensor:
    """The tower's patch features of pictures under `folder`, once for the whole training: 'I M W'."""
    parts = []
    for start in range(0, len(images), 16):
        files = (folder / image for image in images[start : start + 16])
        parts.append(model.encode_patches(torch.stack([preprocess(file.read_bytes()) for file in files])))
    return torch.cat(parts)


def train_teacher(
    model: MobileVLMForCausalLM, checkpoint: Path, data: Path, *, align_steps: int, epochs: int
) -> dict[str, Tensor]:
    """Both steps on the teacher's scenes under `data`; `model` as built, `checkpoint` the same as a folder."""
    tokenizer = load_tokenizer(checkpoint)
    preprocess = ImagePreprocessor.from_pretrained(checkpoint, aspect_ratio="pad", image_size=IMAGE_SIZE)
    concepts = list(all_concepts())
    records = [r for name in TEACHER_SETS for r in json.loads((data / f"{name}.json").read_text())]
    asked = group_by_image(records, tokenizer, template="chatml")
    features = compute_features(model, preprocess, data / "images", [item.image for item in asked])
    words = embed_words(model, tokenizer, concepts)
    align_projector(model, features, facts_of_scenes(concepts), words, num_steps=align_steps)
    return train_answers(model, asked, features, epochs=epochs, snapshot=checkpoint / "learned.safetensors")


def train_answers(
    model: MobileVLMForCausalLM,
    asked: list[ImageQuestions],
    features: Tensor,
    *,
    epochs: int,
    snapshot: Path | None = None,
) -> dict[str, Tensor]:
    """Step 2: LoRA learns the answers; `features` 'I M W' in the order of `asked`, whose questions share a prefix.

    Returns what was learned, as `learned_of` has it; on the way `snapshot` gets the same.
    """
    batch_size = 4
    model.requires_grad_(False)
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
    inject_adapter_in_model(adapters, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps_an_epoch = len(asked) // batch_size
    optimizer, schedule = one_cycle(trained, learning_rate=1e-3, num_steps=epochs * steps_an_epoch)
    generator = torch.Generator().manual_seed(2)
    started, step = time.monotonic(), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(asked), generator=generator).split(batch_size)[:steps_an_epoch]:
            loss = answer_loss(model, [asked[row] for row in rows], features[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if snapshot is not None and step % SNAPSHOT_STEPS == 0:
                save_tensors(learned_of(model), snapshot)
            if step % 10 == 0:
                spent = time.monotonic() - started
                print(
                    f"answers step {step}/{epochs * steps_an_epoch}: loss {loss.item():.4f}, {spent:.0f} s",
                    flush=True,
                )
    return learned_of(model)


def learned_of(model: MobileVLMForCausalLM) -> dict[str, Tensor]:
    """float16: the projector under its own names, and A and B (scale included) of every layer changed: W + B A."""
    projector = model.model.mm_projector.state_dict(prefix="model.mm_projector.")
    learned = dict(projector)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            lora: Any = module  # typed as any module where peft is not installed
            learned[f"{name}.lora_A"] = lora.lora_A["default"].weight
            learned[f"{name}.lora_B"] = lora.lora_B["default"].weight * lora.scaling["default"]
    return {name: value.detach().half().contiguous() for name, value in learned.items()}
