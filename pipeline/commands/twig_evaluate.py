"""Twigs: twig evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, ConfigFile, Overrides, load, say


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    twig: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a twig; several: the same training with other seeds. Default: OUTPUT_DIR/twig."
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: another training's twig at the same place, compared with the first."),
    ] = None,
    selectors: Annotated[
        str, typer.Option(help="Rules that choose vision tokens; also: layer N, counted from 0.")
    ] = "twig,fastv,fastv+T,random",
    keep: Annotated[str, typer.Option(help="Shares of vision tokens that are kept.")] = "1/3,2/9,1/9",
    speed: Annotated[bool, typer.Option(help="Measure the speed, too.")] = True,
    turns: Annotated[int, typer.Option(min=1, help="Turns in which each way answers the same prompts.")] = 10,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a turn.")] = 3,
    ways: Annotated[str, typer.Option(help="More timed drafts: auto, look_up, tree, tree_if_faster.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Images of each test set; default: all.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of predictions and results; default: OUTPUT_DIR/twig_evaluation."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace predictions that were made with other settings.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what pruning keeps of the accuracy, and how fast drafts are, on the held-out questions.

    The base is the config's teacher. Predictions are kept: the same command resumes, and more selectors add files.
    """
    settings = load(config, overrides)
    from pipeline.errors import needing

    with needing("report", by="alignkd twig evaluate"):
        from pipeline.twig.evaluation.evaluate import Asked, evaluate_twigs
        from pipeline.twig.evaluation.figures import write_figures
    from pipeline.twig.evaluation.beside import parse_beside
    from pipeline.twig.evaluation.result import FOLDER, RESULT
    from pipeline.twig.evaluation.shares import parse_shares
    from pipeline.twig.evaluation.tables import tables_of

    folder = output or Path(settings.output_dir) / FOLDER
    asked = Asked(
        selectors=selectors,
        shares=parse_shares(keep),
        turns=turns if speed else 0,
        prompts=prompts,
        extras=[name.strip() for name in ways.split(",") if name.strip()],
        limit=limit,
        overwrite=overwrite,
        beside=parse_beside(beside or []),
    )
    result = evaluate_twigs(settings, twig or [Path(settings.output_dir) / "twig"], asked, folder, say=say)
    write_figures(result, folder)
    print((folder / RESULT).read_text() if as_json else tables_of(result), end="\n" * (not as_json))
