"""How the demo's teacher was trained (`make demo-teacher`): tower first, then language model on a frozen tower.

1. The tower learns shape and colour of every training image, through an attention-pooled linear head that is
   thrown away; labels are what the training questions say of the image; images are shifted and mirrored.
2. Tower frozen, projector and language model learn to answer; all questions of an image share one prefix.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import typer
from torch import nn

from pipeline.data.images import ImagePreprocessor
from pipeline.data.tokenizer import load_tokenizer
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.positions import IGNORE_INDEX
from pipeline.studies import demo
from pipeline.studies.demo_card import write_card
from pipeline.studies.shared_prefix import ImageQuestions, answer_loss, group_by_image

MAX_SHIFT_PIXELS = 12
NUM_VARIANTS = 4


def known_of_image(asked: list[tuple[str, str, int]]) -> dict[int, tuple[int, int]]:
    """(colour, shape) of every image as its questions and answers tell; -100 where they do not."""
    known: dict[int, list[int]] = {}
    for question, answer, image in asked:
        facts = known.setdefault(image, [IGNORE_INDEX, IGNORE_INDEX])
        words = question.rstrip("?").split()
        positive = answer != "no" if not {"not", "no"} & set(words) else answer == "no"
        for slot, names in enumerate((demo.COLOURS, demo.SHAPES)):
            for name in [answer, *(words if positive else [])]:
                if name in names:
                    facts[slot] = names.index(name)
    return {image: (colour, shape) for image, (colour, shape) in known.items()}


def load_images(split: str, preprocess: ImagePreprocessor) -> torch.Tensor:
    """All images of a split by number: float32 'I C Y X'."""
    folder = demo.easy_vqa_folder() / split / "images"
    return torch.stack(
        [preprocess((folder / f"{i}.png").read_bytes()) for i in range(len(list(folder.iterdir())))]
    )


def shifted_and_mirrored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to 12 pixels, background filled in, half of them mirrored: 'I C Y X'."""
    count, _, height, width = images.shape
    background = images.flatten(2).mode(dim=2).values[:, :, None, None]
    pad = MAX_SHIFT_PIXELS
    canvas = background.expand(-1, -1, height + 2 * pad, width + 2 * pad).clone()
    canvas[:, :, pad:-pad, pad:-pad] = images
    top, left = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = torch.arange(count)[:, None, None]
    return canvas.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class PooledHead(nn.Module):
    """Shape and colour from patch features, pooled by one trained query: 'I M W' -> 'I 8', 'I 3'."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, 1)
        self.colour = nn.Linear(width, len(demo.COLOURS))
        self.shape = nn.Linear(width, len(demo.SHAPES))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = (self.query(features).softmax(dim=1) * features).sum(dim=1)
        return self.colour(pooled), self.shape(pooled)


def one_cycle(parameters, *, learning_rate: float, num_steps: int):
    """AdamW with a linear warm-up over 5% of the steps and a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    warmup = max(1, num_steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def train_tower(
    model: MobileVLMForCausalLM, images: torch.Tensor, facts: torch.Tensor, *, epochs: int
) -> None:
    """Step 1: `images` 'I C Y X', `facts` int64 'I 2' (colour, shape; -100 unknown)."""
    tower = model.model.vision_tower
    layers = tower.vision_tower.vision_model
    head = PooledHead(tower.config.hidden_size)
    layers.requires_grad_(True)
    batch_size = 128
    steps_an_epoch = len(images) // batch_size
    trained = [*layers.parameters(), *head.parameters()]
    optimizer, schedule = one_cycle(trained, learning_rate=1e-3, num_steps=epochs * steps_an_epoch)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(epochs):
        right = torch.zeros(2)
        started = time.monotonic()
        for rows in torch.randperm(len(images), generator=generator).split(batch_size)[:steps_an_epoch]:
            pixels = shifted_and_mirrored(images[rows], generator)
            features = layers(pixels, num_layers=tower.num_layers)[:, tower.first_token :]
            scores = head(features)
            colour_loss, shape_loss = map(nn.functional.cross_entropy, scores, facts[rows].T)
            loss = colour_loss + shape_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += torch.stack(
                [(s.argmax(1) == f).sum() for s, f in zip(scores, facts[rows].T, strict=True)]
            )
        colour, shape = right / (steps_an_epoch * batch_size)
        print(
            f"tower epoch {epoch + 1}/{epochs}: colour {colour:.3f} shape {shape:.3f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    layers.requires_grad_(False)


@torch.no_grad()
def features_of_variants(model: MobileVLMForCausalLM, images: torch.Tensor) -> torch.Tensor:
    """Patch features of every image as it is and of three moved copies: 'variant I M W'."""
    generator = torch.Generator().manual_seed(2)
    variants = [images, *(shifted_and_mirrored(images, generator) for _ in range(NUM_VARIANTS - 1))]
    return torch.stack(
        [torch.cat([model.encode_patches(part) for part in variant.split(256)]) for variant in variants]
    )


def train_language(
    model: MobileVLMForCausalLM, asked: list[ImageQuestions], features: torch.Tensor, *, epochs: int
) -> None:
    """Step 2: projector and language model learn the answers; `features` 'variant I M W'."""
    batch_size = 8
    steps_an_epoch = len(asked) // batch_size
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = one_cycle(trained, learning_rate=1e-3, num_steps=epochs * steps_an_epoch)
    generator = torch.Generator().manual_seed(3)
    for epoch in range(epochs):
        total, started = 0.0, time.monotonic()
        for rows in torch.randperm(len(asked), generator=generator).split(batch_size)[:steps_an_epoch]:
            chosen = [asked[row] for row in rows]
            variant = torch.randint(len(features), (len(chosen),), generator=generator)
            loss = answer_loss(
                model, chosen, features[variant, [int(Path(item.image).stem) for item in chosen]]
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"language epoch {epoch + 1}/{epochs}: loss {total / steps_an_epoch:.4f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def main(
    output: Path = demo.TEACHER, tower_epochs: int = 60, language_epochs: int = 6, seed: int = 0
) -> None:
    """Train the demo's teacher on easy-VQA's training split, write it as a checkpoint, and measure it."""
    started = time.monotonic()
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    records = demo.conversations("train")
    demo.write_tokenizer(output, records)
    tokenizer = load_tokenizer(output)
    preprocess = ImagePreprocessor.from_pretrained(output, aspect_ratio="pad", image_size=demo.IMAGE_SIZE)
    model = MobileVLMForCausalLM(demo.model_config(demo.TEACHER_LANGUAGE))
    images = load_images("train", preprocess)
    known = known_of_image(demo.questions("train"))
    train_tower(model, images, torch.tensor([known[i] for i in range(len(images))]), epochs=tower_epochs)
    features = features_of_variants(model, images)
    train_language(model, group_by_image(records, tokenizer, template="v1"), features, epochs=language_epochs)
    model.save_pretrained(output)
    minutes = (time.monotonic() - started) / 60
    write_card(
        output, model, seed=seed, tower_epochs=tower_epochs, language_epochs=language_epochs, minutes=minutes
    )


if __name__ == "__main__":
    typer.run(main)
