"""Models: models check, models list, make-student."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check whether a model can be a teacher or a student.")


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A checkpoint: a local folder or a hub id.")],
) -> None:
    """Run the conformance suite on a checkpoint's first layers: the first thing to do with a new model."""
    from pipeline.conformance.report import check_model

    passed = True
    for line in check_model(model):
        print(f"{'ok    ' if line.passed else 'FAILED'} {line.text}", flush=True)
        passed &= line.passed
    if not passed:
        raise typer.Exit(1)


@app.command("list")
def list_() -> None:
    """List the model families that are let in, by their `model_type`."""
    from pipeline.models.families import FAMILIES

    print("\n".join(sorted(FAMILIES)))


def make_student(
    teacher: Annotated[str, typer.Argument(help="The teacher: a local folder or a hub id.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the student's checkpoint.")],
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers to keep, such as 0,1,2,3 or 0-11; default: all.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Width to keep of every layer; default: all.")
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            help="Pretrained language model of the teacher's kind and vocabulary, in place of its own."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the tensors that are new.")] = 0,
) -> None:
    """Cut a student from a teacher: its tower, projector and processor, and a smaller language model.

    It answers nothing sensible before it is trained. Cutting the width costs more of what the teacher knows than
    cutting layers does.
    """
    from transformers.utils import logging

    from pipeline.models import cut
    from pipeline.progress import can_redraw

    if not can_redraw(sys.stderr):
        logging.disable_progress_bar()
    made = cut.make_student(
        teacher,
        folder,
        layers=None if layers is None else cut.parse_layers(layers),
        width=width,
        language_model=language_model,
        seed=seed,
    )
    share = made.student_parameters / made.teacher_parameters
    print(
        f"{folder}: {made.student_parameters / 1e6:,.1f} M parameters, {share:.0%} of the teacher's "
        f"{made.teacher_parameters / 1e6:,.1f} M"
    )
    if made.fresh:
        print(f"new and untrained: {', '.join(made.fresh)}")
    print(f"next: name it as student.model in a config, or check it with `alignkd models check {folder}`")
