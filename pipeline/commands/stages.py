"""From annotations to a student: init, pack, teacher-cache, distill."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.commands.options import (
    AllowFewer,
    ConfigFile,
    Overrides,
    Overwrite,
    PrintConfig,
    counted,
    fail_unless,
    load,
    print_reasons,
    say,
)

if TYPE_CHECKING:
    from pipeline.teacher_cache.teacher import CacheSummary


def init(
    place: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of images and annotations, or a file of annotations."),
    ],
    teacher: Annotated[str, typer.Option(help="The teacher: a local folder or a hub id.")],
    student: Annotated[
        str | None, typer.Option(help="The student; default: one that is cut from the teacher.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for config, shards and store; default: runs/ and DIR's name.")
    ] = None,
    with_plan: Annotated[bool, typer.Option("--plan/--no-plan", help="Also run `alignkd plan`.")] = True,
) -> None:
    """Begin with your own data: look at what is there, write a config that runs, and say what to type next.

    Annotations are packed into shards. Lengths are measured through the teacher's processor, and the reason of each
    setting is in the config. Then the config's plan is printed: bytes, hours, and whether they fit. The exit code is
    1 if no plan can be made of this teacher and data.
    """
    from pipeline.init.begin import begin
    from pipeline.progress import Progress

    output = output or Path("runs") / (place.resolve().name if place.is_dir() else place.stem)
    with Progress("pack", unit="entries", doing=f"reading {place}") as progress:
        begun = begin(place, output, teacher=teacher, student=student, say=print, progress=progress)
    print(f"config       {begun.config}")
    if with_plan:
        _print_plan(begun.config)
    print("\nnext:")
    for command in begun.commands:
        print(f"  {command}")


def _print_plan(config: Path) -> None:
    """Print a config's plan; if nothing of the data or the teacher can be used, end with exit code 1.

    A machine that is too small for the teacher leaves the config as it is.
    """
    from pipeline.errors import ConfigError, PipelineError
    from pipeline.progress import Progress
    from pipeline.upkeep.describe import describe_plan
    from pipeline.upkeep.plan import plan_store

    again = f"put it right, remove {config}, and type the same command again"
    try:
        with Progress("plan", unit="samples", doing="reading the teacher") as progress:
            # The student was checked, or is made by the first of the commands.
            plan = plan_store(load(config, None), num_samples=64, progress=progress, checks_student=False)
    except ConfigError as error:
        say(f"alignkd: the plan could not be made: {error}; {again}")
        raise typer.Exit(1) from error
    except (PipelineError, MemoryError, RuntimeError) as error:
        command = f"alignkd plan --config {shlex.quote(str(config))}"
        say(f"the plan could not be made: {error}; try `{command}` where the teacher fits")
        return
    print(f"\n{describe_plan(plan)}")
    if not plan.is_known:
        say(f"alignkd: no sample can be used; {again}")
        raise typer.Exit(1)


def pack(
    annotations: Annotated[
        str,
        typer.Argument(
            help="JSON, JSONL, CSV or Parquet file, folder of `datasets` or of images with texts, or Hub id."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for shard-000000.tar, shard-000001.tar, ...")],
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Folder that image paths start from; default: that of the annotations."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset (configuration) of a data set.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set that has several.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    on_bad_sample: Annotated[
        Literal["reject", "fail"], typer.Option(help="reject: list it and continue; fail: stop.")
    ] = "reject",
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Larger images are refused.")] = 64_000_000,
    again: Annotated[bool, typer.Option("--again", help="Pack all again, then replace the pack.")] = False,
    allow_fewer: AllowFewer = False,
) -> None:
    """Turn annotations and their images into WebDataset shards.

    The forms of LLaVA, LLaMA-Factory, TRL, ms-swift, OpenAI and of usual Hub sets are read; docs/data.md lists them.
    Bad samples are counted, and listed with a reason in rejects.jsonl next to the shards. A rerun leaves a finished
    pack as it is, but retries rejected samples whose images have changed. The exit code is 1 if nothing was packed.
    """
    from pipeline.packing.pack import pack as pack_shards
    from pipeline.progress import Progress

    with Progress("pack", unit="entries", doing=f"reading {annotations}") as progress:
        summary = pack_shards(
            annotations,
            output,
            image_folder=image_folder,
            subset=subset,
            split=split,
            samples_per_shard=samples_per_shard,
            on_bad_sample=on_bad_sample,
            max_pixels=max_image_pixels,
            again=again,
            allow_fewer=allow_fewer,
            progress=progress,
            say=say,
        )
    print(
        f"{output}: {summary.seen:,} samples seen = {summary.packed:,} packed + {summary.rejected:,} rejected, "
        f"{len(summary.shards)} shards"
    )
    print_reasons(summary.rejects_by_reason, where=str(output / "rejects.jsonl"))
    if summary.packed == 0:
        say(f"alignkd: nothing was packed of {annotations}")
    fail_unless(summary.packed > 0)


def teacher_cache(
    config: ConfigFile,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    rank: Annotated[int | None, typer.Option(min=0, help="Number of this worker; default: RANK.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of workers on the store; default: WORLD_SIZE.")
    ] = None,
    recapture_changed: Annotated[
        bool,
        typer.Option(
            "--recapture-changed", help="Recapture shards that changed since their part was written."
        ),
    ] = False,
) -> None:
    """Stage 1: stream the shards through the teacher once and write the store.

    One shard becomes one immutable part. Rerun to resume; a finished store stays as it is. A warning says if the
    teacher's answers hardly depend on the images.
    Several workers may write one store at once: under torchrun, as a SLURM array, or on several machines. Each has
    its share of the shards and takes over the shards of workers that died.
    """
    settings = load(config, overrides, print_config)
    from cache import summarise
    from pipeline.readable import readable_bytes
    from pipeline.teacher_cache.teacher import cache_teacher
    from pipeline.teacher_cache.workers import worker_of
    from pipeline.upkeep.describe import reasons_by_kind

    try:
        run = cache_teacher(settings, worker_of(rank, world_size), recapture_changed=recapture_changed)
    except KeyboardInterrupt:
        _report_interruption(settings.one_cache.path)
        raise typer.Exit(130) from None
    print(
        f"{run.path}: {run.parts_written} parts written, {run.parts_found} found done; "
        f"{run.seen:,} samples seen = {run.cached:,} cached + {run.rejected:,} rejected"
    )
    store = summarise(run.path)
    size, each = readable_bytes(store.bytes), readable_bytes(store.bytes_per_sample)
    print(f"the store holds {store.samples:,} samples in {size}, {each} each")
    print_reasons(reasons_by_kind(store.rejects_by_reason), where="the parts' rejects.jsonl")
    if troubles := _troubles(run, num_samples=store.samples):
        print("\n".join(troubles), file=sys.stderr)
    fail_unless(not troubles)


def _troubles(run: CacheSummary, *, num_samples: int) -> list[str]:
    """Return lines about what a run of stage 1 left undone, and what to do about it."""
    troubles: list[str] = []
    if run.broken:
        troubles += [f"alignkd: {counted(run.broken, 'shard')} could not be cached:", *run.broken]
    if run.changed:
        troubles += [
            f"alignkd: {counted(run.changed, 'shard')} changed since the part was captured, which stays as it was; "
            "the same command with --recapture-changed captures what is there now in its place; a different shard of "
            "the same name needs another name:",
            *run.changed,
        ]
    if not run.broken and (not num_samples or (run.seen and not run.cached)):
        where = "this run cached no sample" if num_samples else "the store holds no sample"
        troubles.append(f"alignkd: {where}: all {run.seen:,} were rejected, for the reasons above")
    return troubles


def _report_interruption(path: str) -> None:
    from cache import CacheError, Store

    try:
        store = Store(path)
    except CacheError:
        say("alignkd: interrupted before the store was begun; run the same command again to start")
        return
    planned = len(store.manifest.planned_parts)
    say(
        f"alignkd: interrupted with {len(store.missing_parts)} of {planned} parts missing; "
        "run the same command again to resume"
    )


def distill(
    config: ConfigFile,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    allow_mismatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Fingerprint field that may differ from the store's: tokenizer, template, image_preprocessing "
            "or capture.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Stage 2: train the student from the store; no teacher is loaded.

    With `baseline: true` the same student is also trained on labels alone, and both are compared. Ctrl-C and SIGTERM
    leave a checkpoint. Earlier trainings are only replaced with --overwrite.
    """
    # As an override, so that the config in the provenance says what was allowed.
    allowed = [f"cache.allow_mismatch=[{','.join(allow_mismatch)}]"] if allow_mismatch else []
    settings = load(config, [*(overrides or []), *allowed], print_config)
    from pipeline.distill.training.processes import connected, is_first_process
    from pipeline.evaluation.experiment import run_experiment

    with connected():
        result = run_experiment(settings, say=say, overwrite=overwrite)
    if is_first_process():
        print(result)
