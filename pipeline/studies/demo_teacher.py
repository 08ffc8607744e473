"""Train the demo's teacher (`make demo-teacher`): first the tower, then the language model on the frozen tower.

1. The tower learns shape and colour of every training image through an attention-pooled linear head, which is
   dropped afterwards. The labels come from the training questions and answers. Images are shifted and mirrored.
2. Projector and language model learn to answer. All questions of an image share one prefix.
"""

from __future__ import annotations

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
from pipeline.studies.training import fit

MAX_SHIFT_PIXELS = 12
NUM_VARIANTS = 4


def known_of_image(asked: list[tuple[str, str, int]]) -> dict[int, list[int]]:
    """Return [colour, shape] of every image, as far as its (question, answer, image) entries tell; -100 otherwise."""
    known: dict[int, list[int]] = {}
    for question, answer, image in asked:
        facts = known.setdefault(image, [IGNORE_INDEX, IGNORE_INDEX])
        words = question.rstrip("?").split()
        is_negated = bool({"not", "no"} & set(words))
        # "Is there no circle?" with the answer "no" says that there is one.
        is_shown = is_negated == (answer == "no")
        for slot, names in enumerate((demo.COLOURS, demo.SHAPES)):
            for name in [answer, *(words if is_shown else [])]:
                if name in names:
                    facts[slot] = names.index(name)
    return known


def load_images(split: str, preprocess: ImagePreprocessor) -> torch.Tensor:
    """Return all images of a split in the order of their numbers: float32 'I C Y X'."""
    folder = demo.easy_vqa_folder() / split / "images"
    files = (folder / f"{number}.png" for number in range(len(list(folder.iterdir()))))
    return torch.stack([preprocess(file.read_bytes()) for file in files])


def shifted_and_mirrored(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each image 'I C Y X' by up to 12 pixels, fill in its background, and mirror half of the images."""
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
    """Predicts colour and shape from patch features, pooled by one trained query: 'I M W' -> 'I 8', 'I 3'."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, 1)
        self.colour = nn.Linear(width, len(demo.COLOURS))
        self.shape = nn.Linear(width, len(demo.SHAPES))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = (self.query(features).softmax(dim=1) * features).sum(dim=1)
        return self.colour(pooled), self.shape(pooled)


def train_tower(
    model: MobileVLMForCausalLM, images: torch.Tensor, facts: torch.Tensor, *, epochs: int
) -> None:
    """Step 1: train the tower on `images` 'I C Y X' and `facts` int64 'I 2' (colour, shape; -100 unknown)."""
    tower = model.model.vision_tower
    layers = tower.vision_tower.vision_model
    head = PooledHead(tower.config.hidden_size)
    generator = torch.Generator().manual_seed(1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        pixels = shifted_and_mirrored(images[rows], generator)
        # Not tower(...), which runs without gradient.
        features = layers(pixels, num_layers=tower.num_layers)[:, tower.first_token :]
        colour, shape = map(nn.functional.cross_entropy, head(features), facts[rows].T)
        return colour + shape

    layers.requires_grad_(True)
    fit(
        [*layers.parameters(), *head.parameters()],
        loss_of,
        name="tower",
        num_rows=len(images),
        batch_size=128,
        num_steps=epochs * (len(images) // 128),
        learning_rate=1e-3,
        generator=generator,
    )
    layers.requires_grad_(False)


def features_of_variants(model: MobileVLMForCausalLM, images: torch.Tensor) -> torch.Tensor:
    """Return patch features of every image as it is and of three moved copies: 'variant I M W'."""
    generator = torch.Generator().manual_seed(2)
    variants = [images, *(shifted_and_mirrored(images, generator) for _ in range(NUM_VARIANTS - 1))]
    return torch.stack(
        [torch.cat([model.encode_patches(part) for part in variant.split(256)]) for variant in variants]
    )


def train_language(
    model: MobileVLMForCausalLM, asked: list[ImageQuestions], features: torch.Tensor, *, epochs: int
) -> None:
    """Step 2: train projector and language model on the answers; `features` 'variant I M W'."""
    generator = torch.Generator().manual_seed(3)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        chosen = [asked[row] for row in rows]
        variant = torch.randint(len(features), (len(chosen),), generator=generator)
        images = [int(Path(item.image).stem) for item in chosen]
        return answer_loss(model, chosen, features[variant, images])

    fit(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        loss_of,
        name="language model",
        num_rows=len(asked),
        batch_size=8,
        num_steps=epochs * (len(asked) // 8),
        learning_rate=1e-3,
        generator=generator,
        max_norm=1.0,
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
    model = MobileVLMForCausalLM(demo.model_config("teacher"))
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
