"""The emoji study's data and models, made from installed packages. Nothing is downloaded at run time.

    python -m pipeline.studies.emoji data      write runs/emoji/data: five sets of LLaVA records and pictures
    python -m pipeline.studies.emoji models    write runs/emoji/models: the checkpoints of teacher and student
    python -m pipeline.studies.emoji teacher   train the teacher and write assets/emoji_teacher
    python -m pipeline.studies.emoji card      measure the teacher on the held-out sets and write its README.md
    python -m pipeline.studies.emoji layers    print which layers of the teacher look at the cell that is asked about

`make emoji` installs what they need and runs the first two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from safetensors.torch import save
from transformers.utils import logging

from pipeline.config.config import load_config
from pipeline.data.preparation import Preparation
from pipeline.errors import PipelineError
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.studies.emoji.card import write_card
from pipeline.studies.emoji.concepts import all_concepts
from pipeline.studies.emoji.data import SETS, TEACHER_SETS, write_sets
from pipeline.studies.emoji.language import write_language_model
from pipeline.studies.emoji.models import (
    add_learned,
    build_model,
    published_tower,
    read_learned,
    write_checkpoint,
)
from pipeline.text_table import text_table

STUDY = Path("runs/emoji")
MODELS = STUDY / "models"
LEARNED = Path("assets/emoji_teacher/learned.safetensors")
STUDENT_LAYERS = 4

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def data(packs: Path = STUDY / "art", output: Path = STUDY / "data") -> None:
    """Draw the scenes and write questions about them; `packs` holds the npm tarballs of the art."""
    write_sets(SETS, packs=packs, output=output)


@app.command()
def models(output: Path = MODELS, student_layers: int = STUDENT_LAYERS) -> None:
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

    write_sets(TEACHER_SETS, packs=packs, output=scenes)
    language = language_model(models)
    model, untrained = build_model(language, published_tower()), models / "untrained_teacher"
    write_checkpoint(model, untrained, language=language)
    learned = train_teacher(model, untrained, scenes, align_steps=align_steps, epochs=epochs)
    LEARNED.parent.mkdir(parents=True, exist_ok=True)
    LEARNED.write_bytes(save(learned))
    print(f"{LEARNED}: {sum(value.numel() for value in learned.values()):,} parameters")


@app.command()
def card(config: Path = Path("configs/emoji.yaml")) -> None:
    """Evaluate the teacher on every held-out question, and write its card."""
    from pipeline.studies.emoji.teacher import RANK

    settings = load_config(config)
    text = write_card(
        LEARNED.with_name("README.md"),
        evaluate_checkpoint(settings, settings.teacher.model),
        training_records=json.loads((STUDY / "data" / "train.json").read_text()),
        learned_sizes={name: value.numel() for name, value in read_learned(LEARNED).items()},
        rank=RANK,
        held_out=sum(concept.held_out for concept in all_concepts()),
        num_scenes=sum(scenes.num_images for scenes in TEACHER_SETS.values()),
    )
    print(text)


@app.command()
def layers(model: Path = MODELS / "teacher", scenes: Path = STUDY / "data", num_questions: int = 48) -> None:
    """Print where a model looks as its answer begins, layer by layer, on validation scenes."""
    from pipeline.models.mobilevlm import MobileVLMForCausalLM
    from pipeline.studies.emoji.looking import questions_about_cells, where_it_looks

    preparation = Preparation.of(str(model), load_config(Path("configs/emoji.yaml")).data)
    asked = questions_about_cells(scenes / "validation.json", num_questions)
    network = MobileVLMForCausalLM.from_pretrained(model).eval()
    looks = where_it_looks(network, preparation, asked, scenes / "images")
    rows = [["layer", "on the image, %", "of that on the asked cell, %"]]
    rows += [
        [str(n), f"{100 * look.on_image:.0f}", f"{100 * look.on_cell:.0f}"] for n, look in enumerate(looks)
    ]
    print(text_table(rows))


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
