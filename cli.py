"""The command line: parse, call one stage, print one summary. Results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.config import Config

EXIT_CODES = """\
Exit codes: 0 done; 1 a check failed or the work could not be done; 2 a wrong command line or config;
3 the store's fingerprint is not what the config asks for; 130 interrupted.
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil a vision-language model in two offline stages: teacher-cache, then distill.\n\n"
    + EXIT_CODES,
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides of the config, such as train.learning_rate=1e-3.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StorePath = Annotated[Path, typer.Argument(help="A store, such as runs/demo/teacher.zarr.")]


@app.command()
def pack(
    annotations: Annotated[Path, typer.Argument(help="LLaVA JSON or JSONL: id, image, conversations.")],
    output: Annotated[Path, typer.Argument(help="Folder for shard-000000.tar, shard-000001.tar, ...")],
    image_folder: Annotated[Path, typer.Option(help="Folder that the `image` paths start from.")],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    on_bad_sample: Annotated[str, typer.Option(help="reject: list it and go on; fail: stop.")] = "reject",
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Larger images are refused.")] = 64_000_000,
) -> None:
    """Turn LLaVA annotations and an image folder into WebDataset shards.

    Bad samples are listed with a reason in rejects.jsonl beside the shards, and counted.
    """
    from pipeline.packing import pack as pack_shards

    if on_bad_sample not in ("reject", "fail"):
        raise typer.BadParameter(f"--on-bad-sample: expected reject or fail, found {on_bad_sample!r}")
    summary = pack_shards(
        annotations,
        output,
        image_folder=image_folder,
        samples_per_shard=samples_per_shard,
        on_bad_sample=on_bad_sample,  # pyright: ignore[reportArgumentType]
        max_pixels=max_image_pixels,
    )
    print(
        f"{output}: {summary.seen:,} samples seen = {summary.packed:,} packed + {summary.rejected:,} rejected, "
        f"{len(summary.shards)} shards"
    )
    _print_reasons(summary.rejects_by_reason, where=str(output / "rejects.jsonl"))


@app.command()
def teacher_cache(config: ConfigFile, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Stage 1: stream the shards through the teacher once and write the store.

    One shard becomes one immutable part. Rerun to go on where a run stopped; a finished store stays as it is.
    """
    settings = _load(config, overrides, print_config)
    from cache import summarise
    from pipeline.describe import reasons_by_kind
    from pipeline.teacher import cache_teacher

    run = cache_teacher(settings)
    print(
        f"{run.path}: {run.parts_written} parts written, {run.parts_found} found done; "
        f"{run.seen:,} samples seen = {run.cached:,} cached + {run.rejected:,} rejected"
    )
    store = summarise(run.path)
    print(
        f"the store holds {store.samples:,} samples in {_bytes(store.bytes)}, {_bytes(store.bytes_per_sample)} each"
    )
    _print_reasons(reasons_by_kind(store.rejects_by_reason), where="the parts' rejects.jsonl")
    if run.broken:
        shards = "1 shard has" if len(run.broken) == 1 else f"{len(run.broken)} shards have"
        print("\n".join([f"alignkd: {shards} no part:", *run.broken]), file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def distill(config: ConfigFile, overrides: Overrides = None, print_config: PrintConfig = False) -> None:
    """Stage 2: train the student from the store; no teacher is loaded.

    With `baseline: true` the same student is also trained on labels alone, and both are compared.
    """
    settings = _load(config, overrides, print_config)
    from pipeline.experiment import run_experiment

    print(run_experiment(settings, say=_say))


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or hub id; default: the config's teacher.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for the predictions, JSON lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Exact-match accuracy of a checkpoint on the config's held-out conversations, by question type."""
    settings = _load(config, overrides, False)
    from pipeline.compare import accuracy_table
    from pipeline.evaluate import accuracy_by_type, by_test_set
    from pipeline.scores import evaluate_checkpoint

    sets = by_test_set(evaluate_checkpoint(settings, model or settings.teacher.model, output=output))
    if as_json:
        scores = {test_set: accuracy_by_type(predictions) for test_set, predictions in sets.items()}
        print(json.dumps({
            test_set: {name: {"accuracy": share, "questions": n} for name, (share, n) in by_type.items()}
            for test_set, by_type in scores.items()
        }))  # fmt: skip
        return
    for test_set, predictions in sets.items():
        print(f"test set {test_set}\n" if len(sets) > 1 else "", end="")
        print(accuracy_table({model or "teacher": predictions}))


@app.command()
def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="key=value,value; repeat it. losses= takes sets: see below.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: OUTPUT_DIR/sweep.")] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time, each with its share of cores or GPUs.")
    ] = 1,
    keep_models: Annotated[bool, typer.Option(help="Keep every student's weights.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and stop.")] = False,
) -> None:
    """Many student experiments from one store: every combination of --vary, each held against labels alone.

    --vary losses= takes none, all, all-LOSS, LOSS+LOSS and leave-one-out; any other key is one of the config's,
    such as --vary losses.attention.distance=kl,mse --vary data.fraction=0.02,0.1 --vary train.seed=0,1,2.
    A run that is done is not done again. Exit code 1 if a run failed; the others are in the table.
    """
    settings = _load(config, overrides, False)
    from pipeline.config import load_config
    from pipeline.curves import draw_sweep
    from pipeline.scores import teacher_predictions
    from pipeline.sweep import run_sweep
    from pipeline.sweep_summary import summarise_sweep, summary_tables
    from pipeline.variations import parse_vary, plan_runs

    runs = plan_runs(lambda more: load_config(config, [*(overrides or []), *more]), parse_vary(vary or []))
    if dry_run:
        print("\n".join(run.name for run in runs))
        return
    folder = output or Path(settings.output_dir) / "sweep"
    lines, failed = run_sweep(settings, runs, folder, jobs=jobs, keep_models=keep_models, say=_say)
    if lines:
        summary = summarise_sweep(folder, lines, teacher=teacher_predictions(settings))
        draw_sweep(
            summary["rows"], folder / "summary.png", folder / "summary.svg", teacher=summary["teacher"]
        )
        print(summary_tables(summary))
    if failed:
        raise typer.Exit(1)


@app.command()
def info(store: StorePath, as_json: AsJson = False) -> None:
    """What a store holds: teacher, targets with their stated errors, samples, rejects, bytes, provenance."""
    from cache import summarise

    summary = summarise(store)
    if as_json:
        print(json.dumps(summary.to_json(), indent=1))
        return
    from pipeline.describe import describe_store

    print(describe_store(summary))


@app.command()
def verify(
    store: StorePath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every file and decode every value.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for damage: missing or unfinished parts, flipped bytes, wrong counts; exit code 1 if there is any."""
    from cache import verify as verify_store

    report = verify_store(store, deep=deep)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for problem in report.problems:
            print(f"{problem.kind}: {problem.file}: {problem.detail}")
        print(
            f"{store}: {len(report.problems)} problems in {report.parts} parts, {report.samples:,} samples, "
            f"{report.files} files, {_bytes(report.bytes)}{'' if deep else ' (contents not read; --deep does)'}"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def _load(config: Path, overrides: list[str] | None, print_config: bool) -> Config:
    """The resolved config; with --print-config it is printed and the command ends."""
    from transformers.utils import logging

    from pipeline.config import load_config, to_yaml

    logging.disable_progress_bar()
    settings = load_config(config, overrides or [])
    if print_config:
        print(to_yaml(settings), end="")
        raise typer.Exit()
    return settings


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_reasons(reasons: dict[str, int], *, where: str) -> None:
    for reason, count in reasons.items():
        print(f"  {count:,} rejected: {reason}")
    if reasons:
        print(f"  the list is in {where}")


def _bytes(count: float) -> str:
    from pipeline.describe import readable_bytes

    return readable_bytes(count)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; what goes wrong outside the program is one sentence on stderr and an exit code."""
    from cache import CacheError, FingerprintMismatch
    from pipeline.errors import ConfigError, PipelineError

    try:
        return app(arguments)
    except FingerprintMismatch as error:
        code, message = 3, str(error)
    except ConfigError as error:
        code, message = 2, str(error)
    except (CacheError, PipelineError) as error:
        code, message = 1, str(error)
    except OSError as error:
        # Files, disks and networks: the system's own words name the file and the trouble.
        code, message = 1, str(error)
    print(f"alignkd: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
