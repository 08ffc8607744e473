"""The demo's data and models: easy-VQA as LLaVA conversations, its tokenizer, and a small untrained student.

The teacher is in `assets/demo_teacher`; `pipeline/studies/demo_teacher.py` trained it.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from transformers.utils import logging

from pipeline.data.templates import TEMPLATES
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM

DATA = Path("runs/demo/data")
TEACHER = Path("assets/demo_teacher")
STUDENT = Path("runs/demo/student")

IMAGE_SIZE = 64
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# Geometry of the tower and of the two language models, and the options of the tokenizer's trainer.
SIZES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

app = typer.Typer(add_completion=False, help=__doc__)


def model_config(model: str) -> MobileVLMConfig:
    """Return the config of the demo's `teacher` or `student`: 64 patches of an image become 4 x 4 vision tokens."""
    return MobileVLMConfig(
        **SIZES[model],
        vocab_size=SIZES["tokenizer"]["vocab_size"],
        max_position_embeddings=512,
        # LLaMA's 0.02 suits thousands of channels. At these widths it leaves attention flat for an epoch.
        initializer_range=0.07,
        pad_token_id=0,
        mm_vision_tower=None,
        mm_vision_select_layer=-1,
        mm_projector_grid=4,
        vision_config=SIZES["tower"],
    )


def easy_vqa_folder() -> Path:
    """Return the folder of images and questions in the installed package easy-vqa."""
    return Path(str(importlib.resources.files("easy_vqa"))) / "data"


def questions(split: str) -> list[tuple[str, str, int]]:
    """Return (question, answer, image number) of the published split, `train` or `test`."""
    return [tuple(row) for row in json.loads((easy_vqa_folder() / split / "questions.json").read_text())]


def question_type(answer: str) -> str:
    """Return the type of a question with this answer: `yes/no`, `shape` or `colour`."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def llava_record(key: str, image: str, question_type: str, question: str, answer: str) -> dict[str, Any]:
    """Return one question as a LLaVA record; `image` is relative to an image folder."""
    return {
        "id": key,
        "image": image,
        "question_type": question_type,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": answer},
        ],
    }


def conversations(split: str, *, num_images: int | None = None) -> list[dict[str, Any]]:
    """Return the questions of a split, or of its first `num_images` images, as LLaVA records."""
    return [
        llava_record(
            f"easy-vqa-{split}-{image:04d}-{number:05d}",
            f"{split}/images/{image}.png",
            question_type(answer),
            question,
            answer,
        )
        for number, (question, answer, image) in enumerate(questions(split))
        if num_images is None or image < num_images
    ]


@app.command()
def data(num_train_images: int | None = None) -> None:
    """Write easy-VQA, from its package, as LLaVA conversations: runs/demo/data/train.json and test.json."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split, num_images in (("train", num_train_images), ("test", None)):
        records = conversations(split, num_images=num_images)
        (DATA / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n")
        print(f"{DATA / split}.json: {len(records)} conversations")


@app.command()
def images() -> None:
    """Print the image folder of the conversations."""
    print(easy_vqa_folder())


def write_tokenizer(folder: Path, records: Iterable[dict[str, Any]]) -> None:
    """Train the demo's tokenizer on conversations and write it as `tokenizer.model`.

    It is a LLaMA-style sentencepiece model of 512 pieces. With byte fallback, every text has ids.
    """
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(TEMPLATES["v1"].render(record["conversations"]) for record in records),
            model_writer=file,
            **SIZES["tokenizer"],
        )


@app.command()
def student(seed: int = 0, folder: Path = STUDENT) -> None:
    """Write the demo's untrained student: the teacher's tower and tokenizer, a small random language model."""
    logging.disable_progress_bar()
    teacher = MobileVLMForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    torch.manual_seed(seed)
    model = MobileVLMForCausalLM(model_config("student"))
    model.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    model.save_pretrained(folder)
    shutil.copy(TEACHER / "tokenizer.model", folder)
    print(f"{folder}: {language_parameters(model):,} parameters in the language model")


def language_parameters(model: MobileVLMForCausalLM) -> int:
    """Return the number of parameters without tower and projector: embeddings, decoder layers and head."""
    vision = ("model.vision_tower.", "model.mm_projector.")
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(vision))


if __name__ == "__main__":
    app()
