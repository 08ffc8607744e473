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

from pipeline.config.config import load_config
from pipeline.data.images import ImagePreprocessor
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.models.mobilevlm.tokenizer import load_tokenizer
from pipeline.positions import IGNORE_INDEX
from pipeline.studies import demo
from pipeline.studies.cards import most_frequent_answers, write_card
from pipeline.studies.shared_prefix import group_by_image
from pipeline.studies.training import fit, fit_answers

CARD = Path(__file__).with_name("demo_card.md")
MAX_SHIFT_PIXELS = 12
NUM_VARIANTS = 4


def known_of_images(asked: list[tuple[str, str, int]]) -> torch.Tensor:
    """Return what (question, answer, image) entries say of colour and shape: int64 'I 2', -100 where nothing does.

    The images are in the order in which they are first asked about.
    """
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
    return torch.tensor(list(known.values()))


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
        generator=generator,
    )
    layers.requires_grad_(False)


def features_of_variants(model: MobileVLMForCausalLM, images: torch.Tensor) -> torch.Tensor:
    """Return patch features of every image as it is and of three moved copies: 'variant I M W'."""
    generator = torch.Generator().manual_seed(2)
    variants = [images, *(shifted_and_mirrored(images, generator) for _ in range(NUM_VARIANTS - 1))]
    return torch.stack(
        [torch.cat([model.get_patch_features(part) for part in variant.split(256)]) for variant in variants]
    )


def write_demo_card(output: Path, model: MobileVLMForCausalLM, **facts: object) -> None:
    """Evaluate the checkpoint in `output` on shards of the test split, and write its README.md."""
    predictions = evaluate_checkpoint(
        load_config("configs/demo.yaml", [f"teacher.model={output}"]), str(output)
    )
    frequent = most_frequent_answers((question, answer) for question, answer, _ in demo.questions("train"))
    baseline = [
        Prediction(str(number), str(image), demo.question_type(answer), answer, frequent[question])
        for number, (question, answer, image) in enumerate(demo.questions("test"))
    ]
    write_card(
        output / "README.md",
        CARD,
        {"this teacher": predictions, "question alone (most frequent training answer)": baseline},
        decimals=2,
        layers=model.config.num_hidden_layers,
        width=model.config.hidden_size,
        language=demo.language_parameters(model),
        total=sum(p.numel() for p in model.parameters()),
        questions=len(predictions),
        threads=torch.get_num_threads(),
        **facts,
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
    asked = group_by_image(records, load_tokenizer(output), template="v1")
    preprocess = ImagePreprocessor.from_pretrained(output, aspect_ratio="pad", image_size=demo.IMAGE_SIZE)
    files = [demo.easy_vqa_folder() / item.image for item in asked]
    images = torch.stack([preprocess(file.read_bytes()) for file in files])
    model = MobileVLMForCausalLM(demo.model_config("teacher"))
    train_tower(model, images, known_of_images(demo.questions("train")), epochs=tower_epochs)
    features = features_of_variants(model, images)
    generator = torch.Generator().manual_seed(3)

    def of_a_variant(rows: torch.Tensor) -> torch.Tensor:
        return features[torch.randint(NUM_VARIANTS, (len(rows),), generator=generator), rows]

    fit_answers(model, asked, of_a_variant, batch_size=8, epochs=language_epochs, generator=generator)
    model.save_pretrained(output)
    minutes = (time.monotonic() - started) / 60
    write_demo_card(
        output, model, seed=seed, tower_epochs=tower_epochs, language_epochs=language_epochs, minutes=minutes
    )


if __name__ == "__main__":
    typer.run(main)
