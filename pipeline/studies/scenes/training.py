"""Training of the two base models (`python -m pipeline.studies.scenes base plain`, `... redundant`).

`plain` sees all vision tokens in all layers. A small model trained like that reads the image up to its last layer,
and fails where FinalWipe removes it. Large pretrained models do without. `redundant` learns to: it continues from
`plain`, three of four batches are wiped, and two of these also lose a random part of the vision tokens.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.positions import IGNORE_INDEX
from pipeline.studies.emoji.models import published_tower
from pipeline.studies.scenes.alignment import align_projector, sayings_of
from pipeline.studies.scenes.data import BASE_SETS, scenes_of
from pipeline.studies.scenes.dropping import random_subsets, run_layers, with_some_vision, without_vision
from pipeline.studies.scenes.features import features_of
from pipeline.studies.scenes.models import (
    GRID_SIZE,
    build_model,
    learned_model,
    write_checkpoint,
    write_learned,
)
from pipeline.studies.scenes.texts import QUESTIONS
from pipeline.studies.shared_prefix import ImageQuestions, PackedQuestions, group_by_image, pack_questions
from pipeline.studies.training import fit

Kind = Literal["plain", "redundant"]
ATTACH_LAYER, WIPE_LAYER = 1, 12
FEWEST_KEPT, MOST_KEPT = 5, 60
BATCH_SIZE = 8
STEPS: dict[Kind, int] = {"plain": 1400, "redundant": 700}
SAVE_EVERY = 250


@dataclass(frozen=True)
class Lessons:
    """What the base models learn from: questions and patch features 'I M W' of the same images."""

    asked: list[ImageQuestions]
    features: Tensor


def read_lessons(
    model: MobileVLMForCausalLM, checkpoint: Path, study: Path, *, sets: Iterable[str] = BASE_SETS
) -> Lessons:
    """Read sets of scenes in `study`, whose features are computed once; `checkpoint` is the model's."""
    tokenizer = load_tokenizer(checkpoint)
    asked: list[ImageQuestions] = []
    features: list[Tensor] = []
    for name in sets:
        records = json.loads((study / "data" / f"{name}.json").read_text())
        grouped = group_by_image(records, tokenizer, template="chatml")
        images = [study / "data" / "images" / item.image for item in grouped]
        features.append(
            features_of(model, checkpoint, images, file=study / "features" / f"{name}.safetensors")
        )
        asked += grouped
    return Lessons(asked, torch.cat(features))


def train_base(kind: Kind, study: Path, *, learned: Path, align_steps: int, steps: int, seed: int) -> None:
    """Train a base model and write `learned`/KIND.safetensors, also now and then on the way.

    `redundant` continues from the `plain` of that folder.
    """
    model = build_model(published_tower(), seed=seed)
    untrained = study / "models" / "untrained"
    write_checkpoint(model, untrained)
    lessons = read_lessons(model, untrained, study)
    if kind == "plain":
        shown = [scene for name, scenes in BASE_SETS.items() for _, scene, _ in scenes_of(name, scenes)]
        sayings = sayings_of(shown, load_tokenizer(untrained), side=GRID_SIZE)
        align_projector(model, lessons.features, sayings, num_steps=align_steps)
    else:
        model = learned_model(learned / "plain.safetensors", published_tower())
    output = learned / f"{kind}.safetensors"
    learn_answers(model, lessons, kind, output=output, steps=steps, seed=seed)
    write_learned(model, output)


def learn_answers(
    model: MobileVLMForCausalLM, lessons: Lessons, kind: Kind, *, output: Path, steps: int, seed: int
) -> None:
    """Train all but the tower on the answers to all questions of `lessons`."""
    generator = torch.Generator().manual_seed(seed + 2)
    progress = Progress(kind)

    def loss_of(rows: Tensor) -> Tensor:
        batch = pack_questions([lessons.asked[row] for row in rows], model.config.num_vision_tokens)
        vision_tokens = model.model.mm_projector(lessons.features[rows].float())
        keep = dropped_on_the_way(batch, generator, step=progress.step) if kind == "redundant" else {}
        logits, targets, owner = answers_of(model, batch, vision_tokens, keep)
        progress.add(logits, targets, owner)
        if progress.step % SAVE_EVERY == 0:
            write_learned(model, output)
        return weighted_loss(logits, targets, owner, batch)

    fit(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        loss_of,
        name=kind,
        num_rows=len(lessons.asked),
        batch_size=BATCH_SIZE,
        num_steps=steps,
        generator=generator,
        learning_rate=1.5e-3,
        betas=(0.9, 0.98),
        max_norm=1.0,
    )


def dropped_on_the_way(
    batch: PackedQuestions, generator: torch.Generator, *, step: int
) -> Mapping[int, Tensor]:
    """Return what a batch of `redundant` keeps at which layer: of four steps one is whole, one only wiped."""
    wiped = {WIPE_LAYER: without_vision(batch.ids)}
    if step % 4 < 2:
        return wiped if step % 4 else {}
    kept = random_subsets(len(batch.ids), generator, side=GRID_SIZE, fewest=FEWEST_KEPT, most=MOST_KEPT)
    return {ATTACH_LAYER: with_some_vision(batch.ids, kept), **wiped}


def answers_of(
    model: MobileVLMForCausalLM, batch: PackedQuestions, vision_tokens: Tensor, keep: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits 'A V', targets 'A' and the row and number 'A 2' of the question of each answer's token."""
    hidden, left = run_layers(model, batch, vision_tokens, keep)
    targets, owner = batch.targets.gather(1, left), batch.owner.gather(1, left)
    answers = targets != IGNORE_INDEX
    owners = torch.stack([answers.nonzero()[:, 0], owner[answers]], dim=1)
    return model.lm_head(hidden[answers]), targets[answers], owners


def weighted_loss(logits: Tensor, targets: Tensor, owner: Tensor, batch: PackedQuestions) -> Tensor:
    """Return the mean cross entropy in which an answer counts as the square root of its length."""
    question = owner[:, 0] * (int(batch.owner.max()) + 1) + owner[:, 1]
    weight = question.bincount()[question].rsqrt()
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


@dataclass
class Progress:
    """Counts steps, and prints now and then how many answer tokens of each type were right."""

    name: str
    step: int = 0
    right: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, logits: Tensor, targets: Tensor, owner: Tensor) -> None:
        """Count one step."""
        self.step += 1
        hit = (logits.argmax(dim=1) == targets).float()
        for number, question in enumerate(QUESTIONS):
            self.right[question].append(hit[owner[:, 1] == number].mean().item())
        if self.step % 100 == 0:
            shares = (f"{name} {100 * sum(some) / len(some):.0f}" for name, some in self.right.items())
            print(f"{self.name} step {self.step}, % of tokens right: {', '.join(shares)}", flush=True)
            self.right.clear()
