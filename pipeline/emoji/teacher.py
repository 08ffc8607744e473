"""How the study's teacher was trained (`python -m pipeline.emoji teacher`), from published parts, on a frozen tower.

1. The projector learns to say a cell's concept in the language model's own words: the vision tokens of a cell go
   near the mean input embedding of the concept's name, told apart from all other names. No language model runs.
2. Projector and low-rank changes (LoRA) of every layer learn to answer; all questions of an image share one prefix.

What was learned is small, and is kept apart from what was published: `models.py` puts the two together. Needs the
package peft (`pip install 'alignkd[emoji]'`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.conversation import load_tokenizer
from pipeline.demo_teacher import one_cycle
from pipeline.emoji.concepts import Concept, all_concepts
from pipeline.emoji.data import SETS, scenes_of
from pipeline.emoji.scenes import BACKGROUNDS, IMAGE_SIZE
from pipeline.images import ImagePreprocessor
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.shared_prefix import ImageQuestions, answer_loss, group_by_image

RANK = 8
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The vision tokens of each of the 2 x 2 cells, in a grid of 4 x 4.
TOKENS_OF_CELLS = ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))
SHARPNESS = 20.0
COLOUR_SHARE = 0.5
EMPTY = "nothing"


@dataclass(frozen=True)
class Vocabulary:
    """Input embeddings of the words that scenes are described with: `names` 'names D', `colours` 'colours D'.

    The last name is that of an empty cell. Rows of `names` that no training scene shows are False in `allowed`.
    """

    names: Tensor
    colours: Tensor
    allowed: Tensor


def embed_words(
    model: MobileVLMForCausalLM, tokenizer: PreTrainedTokenizerBase, concepts: list[Concept]
) -> Vocabulary:
    """Mean input embedding of every concept's name and every background's, as words inside a sentence."""

    def embed(words: list[str]) -> Tensor:
        table = model.model.embed_tokens.weight.detach()
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        return torch.stack([table[row].mean(dim=0) for row in ids])

    return Vocabulary(
        embed([*(concept.name for concept in concepts), EMPTY]),
        embed(list(BACKGROUNDS)),
        torch.tensor([*(not concept.held_out for concept in concepts), True]),
    )


def facts_of_scenes(concepts: list[Concept]) -> tuple[Tensor, Tensor]:
    """Of the training scenes: the name in each cell, int64 'I 4' (the last for none), and the background, 'I'."""
    index = {concept.name: number for number, concept in enumerate(concepts)}
    cells, backgrounds = [], []
    for _, scene, _ in scenes_of("train", SETS["train"], concepts):
        shown = {thing.cell: index[thing.concept.name] for thing in scene.things}
        cells.append([shown.get(cell, len(concepts)) for cell in range(4)])
        backgrounds.append(list(BACKGROUNDS).index(scene.background))
    return torch.tensor(cells), torch.tensor(backgrounds)


def alignment_loss(tokens: Tensor, cells: Tensor, backgrounds: Tensor, words: Vocabulary) -> Tensor:
    """How far vision tokens 'I N D' are from the words of their cell: told apart by angle, placed by distance."""
    centred = words.names - words.names.mean(dim=0)
    tints = words.colours - words.colours.mean(dim=0)
    pooled = torch.stack([tokens[:, list(cell)].mean(dim=1) for cell in TOKENS_OF_CELLS], dim=1)
    by_name = SHARPNESS * _cosines(pooled, centred).masked_fill(~words.allowed, -1e4)
    by_colour = SHARPNESS * _cosines(tokens.mean(dim=1), tints)
    wanted = words.names[cells] + COLOUR_SHARE * tints[backgrounds][:, None]
    distance = (pooled - wanted).square().sum(dim=-1) / words.names.square().sum(dim=-1).mean()
    return (
        nn.functional.cross_entropy(by_name.flatten(0, 1), cells.flatten())
        + nn.functional.cross_entropy(by_colour, backgrounds)
        + distance.mean()
    )


def _cosines(rows: Tensor, words: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1) @ nn.functional.normalize(words, dim=-1).T


def compute_features(
    model: MobileVLMForCausalLM, preprocess: ImagePreprocessor, folder: Path, images: Sequence[str]
) -> Tensor:
    """The tower's patch features of pictures under `folder`, once for the whole training: 'I M W'."""
    parts = []
    for start in range(0, len(images), 16):
        files = (folder / image for image in images[start : start + 16])
        parts.append(model.patch_features(torch.stack([preprocess(file.read_bytes()) for file in files])))
    return torch.cat(parts)


def train_teacher(
    model: MobileVLMForCausalLM, checkpoint: Path, data: Path, *, align_steps: int, epochs: int
) -> dict[str, Tensor]:
    """Both steps on the training scenes under `data`; `model` as built, `checkpoint` the same as a folder."""
    tokenizer = load_tokenizer(checkpoint)
    preprocess = ImagePreprocessor.from_pretrained(checkpoint, aspect_ratio="pad", image_size=IMAGE_SIZE)
    concepts = list(all_concepts())
    records = json.loads((data / "train.json").read_text())
    asked = group_by_image(records, tokenizer, template="chatml")
    features = compute_features(model, preprocess, data / "images", [item.image for item in asked])
    words = embed_words(model, tokenizer, concepts)
    align_projector(model, features, facts_of_scenes(concepts), words, num_steps=align_steps)
    return train_answers(model, asked, features, epochs=epochs)


def align_projector(
    model: MobileVLMForCausalLM,
    features: Tensor,
    facts: tuple[Tensor, Tensor],
    words: Vocabulary,
    *,
    num_steps: int,
) -> None:
    """Step 1: `features` 'I M W' of the training scenes, `facts` as `facts_of_scenes` gives them."""
    projector = model.model.mm_projector
    optimizer, schedule = one_cycle(projector.parameters(), learning_rate=2e-3, num_steps=num_steps)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, num_steps + 1):
        rows = torch.randint(len(features), (64,), generator=generator)
        cells, backgrounds = (fact[rows] for fact in facts)
        loss = alignment_loss(projector(features[rows]), cells, backgrounds, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"align step {step}/{num_steps}: loss {loss.item():.4f}", flush=True)


def train_answers(
    model: MobileVLMForCausalLM, asked: list[ImageQuestions], features: Tensor, *, epochs: int
) -> dict[str, Tensor]:
    """Step 2: projector and LoRA learn the answers; `features` 'I M W' in the order of `asked`.

    Returns what was learned, as `learned_of` has it.
    """
    model.requires_grad_(False)
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LAYERS))
    inject_adapter_in_model(adapters, model)
    model.model.mm_projector.requires_grad_(True)
    batch_size = 8
    steps_an_epoch = len(asked) // batch_size
    trained = [p for p in model.parameters() if p.requires_grad]
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
            learned[f"{name}.lora_A"] = module.lora_A["default"].weight
            learned[f"{name}.lora_B"] = module.lora_B["default"].weight * module.scaling["default"]
    return {name: value.detach().half().contiguous() for name, value in learned.items()}
