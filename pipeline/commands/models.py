"""Models: models check, models list."""

from __future__ import annotations

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
