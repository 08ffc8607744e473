"""Many experiments from one store, and pages about them: sweep, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import ConfigFile, Overrides, Overwrite, fail_unless, load, say


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    vary: Annotated[list[str] | None, typer.Option(help="key=value,value; repeatable. See below.")] = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Vary one --vary at a time, without combinations.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder; default: OUTPUT_DIR/sweep.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share cores or GPUs.")] = 1,
    keep_models: Annotated[bool, typer.Option(help="Keep every student's weights.")] = True,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
) -> None:
    """Train many students from one store: every combination of --vary, each compared with a labels-only run.

    --vary losses= takes none, all, all-LOSS, LOSS+LOSS and leave-one-out; any other key is one of the config's,
    such as --vary losses.attention.distance=kl,mse --vary data.fraction=0.02,0.1 --vary train.seed=0,1,2.
    With --one-at-a-time the runs are the config itself and one for each value; each still runs with every seed.
    Finished runs are not repeated. The exit code is 1 if a run failed; the others are in the table.
    """
    settings = load(config, overrides)
    from pipeline.config.config import load_config
    from pipeline.distill.training.processes import alone_in
    from pipeline.errors import needing
    from pipeline.evaluation.scores import teacher_predictions
    from pipeline.sweep.lines import keep_teacher
    from pipeline.sweep.run import run_sweep
    from pipeline.sweep.summary import summarise_sweep, summary_tables
    from pipeline.sweep.variations import parse_vary, plan_runs

    with needing("report", by="alignkd sweep"):
        from pipeline.report.curves import draw_sweep
    runs = plan_runs(
        lambda more: load_config(config, [*(overrides or []), *more]),
        parse_vary(vary or []),
        one_at_a_time=one_at_a_time,
    )
    if dry_run:
        print("\n".join(run.name for run in runs))
        return
    folder = output or Path(settings.output_dir) / "sweep"
    with alone_in(folder, setting="--output"):
        lines, failed = run_sweep(
            settings, runs, folder, jobs=jobs, keep_models=keep_models, overwrite=overwrite, say=say
        )
        if taught := teacher_predictions(settings, say=say):
            keep_teacher(folder, taught)
        if lines:
            summary = summarise_sweep(folder, lines)
            pictures = (folder / "summary.png", folder / "summary.svg")
            draw_sweep(summary["rows"], *pictures, teacher=summary["teacher"])
            print(summary_tables(summary))
    fail_unless(not failed)


def report(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a sweep, of one training, or a distill's output_dir.")
    ],
    output: Annotated[Path | None, typer.Option(help="HTML file; default: FOLDER/report.html.")] = None,
) -> None:
    """Write one HTML page about a run or a sweep: accuracies, gains, loss curves, throughput, the store's cost.

    The page loads nothing from the network and runs no script.
    """
    from pipeline.errors import needing

    with needing("report", by="alignkd report"):
        from pipeline.report.page import write_report
    print(write_report(folder, output))
