"""The emoji study's data and models, made from installed packages. Nothing is downloaded at run time.

`make emoji` installs what they need and runs `data` and `models`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from safetensors.torch import save
from transformers.utils import logging

from pipeline.config.config import load_config
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import PipelineError
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.emoji.art import read_art
from pipeline.studies.emoji.card import write_emoji_card
from pipeline.studies.emoji.data import SETS, TEACHER_SETS, write_sets
from pipeline.studies.emoji.looking import questions_about_cells, where_it_looks
from pipeline.studies.emoji.models import (
    add_learned,
    build_model,
    published_tower,
    read_learned,
    write_checkpoint,
    write_language_model,
)
from pipeline.studies.emoji.scenes import all_concepts
from pipeline.text_table import text_table

STUDY = Path("runs/emoji")
MODELS = STUDY / "models"
CONFIG = Path("configs/emoji.yaml")
LEARNED = Path("assets/emoji_teacher/learned.safetensors")

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def data(packs: Path = STUDY / "art", output: Path = STUDY / "data") -> None:
    """Draw the scenes and write questions about them; `packs` holds the npm tarballs of the art."""
    write_sets(SETS, art=read_art(packs, all_concepts()), output=output)


@app.command()
def models(output: Path = MODELS, student_layers: int = 4) -> None:
    """Build the teacher and the untrained student from packages and this repository."""
    language, tower = language_model(output), published_tower()
    student = build_model(language, tower, num_layers=student_layers)
    write_checkpoint(student, output / "student", language=language)
    teacher = build_model(language, tower)
    add_learned(teacher, read_learned(LEARNED))
    write_checkpoint(teacher, output / "teacher", language=language)
    print(f"{output}: teacher with {teacher.config.num_hidden_layers} layers, student with {student_layers}")


@app.command()
def teacher(
    packs: Path = STUDY / "art",
    scenes: Path = STUDY / "data",
    models: Path = MODELS,
    align_steps: int = 1000,
    epochs: int = 1,
) -> None:
    """Train the teacher and write what it learned to assets/emoji_teacher; `models` then builds the checkpoint."""
    from pipeline.studies.emoji.teacher import train_teacher

    write_sets(TEACHER_SETS, art=read_art(packs, all_concepts()), output=scenes)
    language = language_model(models)
    untrained = models / "untrained_teacher"
    model = build_model(language, published_tower())
    write_checkpoint(model, untrained, language=language)
    learned = train_teacher(model, untrained, scenes, align_steps=align_steps, epochs=epochs)
    LEARNED.parent.mkdir(parents=True, exist_ok=True)
    LEARNED.write_bytes(save(learned))
    print(f"{LEARNED}: {sum(value.numel() for value in learned.values()):,} parameters")


@app.command()
def card(config: Path = CONFIG) -> None:
    """Evaluate the teacher on every held-out question, and write its card."""
    settings = load_config(config)
    write_emoji_card(
        LEARNED.with_name("README.md"),
        evaluate_checkpoint(settings, settings.teacher.model),
        training_records=json.loads((STUDY / "data" / "train.json").read_text()),
        learned=read_learned(LEARNED),
    )


@app.command()
def layers(model: Path = MODELS / "teacher", scenes: Path = STUDY / "data", num_questions: int = 48) -> None:
    """Print where a model looks as its answer begins, layer by layer, on validation scenes."""
    preparation = load_preparation(str(model), load_config(CONFIG).data)
    asked = questions_about_cells(scenes / "validation.json", num_questions)
    network = MobileVLMForCausalLM.from_pretrained(model).eval()
    looks = where_it_looks(network, preparation, asked, scenes / "images")
    rows = [[f"{n}", *(f"{100 * share:.0f}" for share in look)] for n, look in enumerate(looks)]
    print(text_table([["layer", "on the image, %", "of that on the asked cell, %"], *rows]))


def language_model(models: Path) -> Path:
    """Return SmolLM2's folder below `models`; the first call converts the package."""
    folder = models / "language"
    if not (folder / "model.safetensors").is_file():
        write_language_model(folder)
    return folder


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        app()
    except PipelineError as error:
        sys.exit(f"error: {error}")
