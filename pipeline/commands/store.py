"""What a store holds, and whether it is whole: info, verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import AsJson, ConfigFile, Overrides, StorePath, load, load_or_stored, say

if TYPE_CHECKING:
    from cache import Report
    from pipeline.config.config import Config


def info(store: StorePath, as_json: AsJson = False) -> None:
    """What a store holds: teacher, targets with their stated errors, samples, rejects, bytes, provenance."""
    from cache import summarise

    summary = summarise(store)
    if as_json:
        print(json.dumps(summary.to_json(), indent=1))
        return
    from pipeline.upkeep.describe import describe_store

    print(describe_store(summary))


def verify(
    store: StorePath,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every file and decode every value.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Capture again what is damaged or missing; needs --config.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The config that the store was made with, for --fix."),
    ] = None,
    allow_fewer: Annotated[
        bool,
        typer.Option(
            "--allow-fewer", help="With --fix: also where a part would hold fewer samples than before."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for damage: missing or unfinished parts, flipped bytes, wrong counts; exit code 1 if there is any.

    With --fix the damaged parts, and no others, are captured again from their shards, and replaced when the new ones
    are whole. It reports what was found and done, and the exit code is that of a second verification.
    """
    from cache import verify as verify_store
    from pipeline.upkeep.describe import readable_bytes

    if fix != (config is not None) or (overrides and not fix):
        raise typer.BadParameter(
            "--fix and --config go together, and overrides with them: the teacher that captures again is the config's"
        )
    deep = deep or fix
    report = verify_store(store, deep=deep)
    if config is not None and not report.is_sound:
        report = _fixed(load(config, overrides), report, allow_fewer)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for problem in report.problems:
            print(f"{problem.kind}: {problem.file}: {problem.detail}")
        depth = "" if deep else " (contents not read; --deep does)"
        print(
            f"{store}: {report.num_problems} problems in {report.parts} parts, {report.samples:,} samples, "
            f"{report.files} files, {readable_bytes(report.bytes)}{depth}"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def check(
    store: StorePath,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to capture again.")] = 64,
    seed: Annotated[int, typer.Option(help="Which ones.")] = 0,
    losses: Annotated[
        bool, typer.Option(help="Also the losses of the config's student, and their gradients.")
    ] = True,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Where teacher and shards are; default: as in stage 1."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Capture some samples again with the live teacher; exit code 1 if a value is beyond its stated error.

    Where no logits are stored a stub of the teacher suffices: a few percent of its weights.
    """
    from pipeline.upkeep.check import check_store
    from pipeline.upkeep.describe_check import describe_check

    settings = load_or_stored(store, config, overrides)
    here = settings.one_cache.model_copy(update={"path": str(store)})  # wherever it was made
    settings = settings.model_copy(update={"cache": here})
    found = check_store(settings, num_samples=samples, seed=seed, with_losses=losses)
    print(json.dumps(found.to_json(), indent=1) if as_json else describe_check(found))
    if not found.is_sound:
        raise typer.Exit(1)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=8, help="Samples to probe, of up to eight shards.")] = 256,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Room for the store, such as 500GB: the first settings that fit are chosen."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a store will take before anything is written: bytes by target, hours, the disk, store or recompute.

    Real samples are probed with the real teacher, on this machine. Exit code 1 if the store does not fit on the disk.
    """
    settings = load(config, overrides)
    from cache import local
    from pipeline.upkeep.describe_plan import describe_plan, parse_bytes
    from pipeline.upkeep.plan import plan_store, plan_within

    local(settings.one_cache.path, doing="written by stage 1")
    if max_bytes is None:
        found = plan_store(settings, num_samples=samples)
    else:
        found = plan_within(settings, max_bytes=parse_bytes(max_bytes), num_samples=samples)
    print(json.dumps(found.to_json(), indent=1) if as_json else describe_plan(found))
    if not found.fits:
        raise typer.Exit(1)


def _fixed(config: Config, report: Report, allow_fewer: bool) -> Report:
    """Repair what the report finds, line by line on stderr; the report of the repaired store."""
    from pipeline.upkeep.repair import repair_store

    for problem in report.problems:
        say(f"found {problem.kind}: {problem.file}: {problem.detail}")
    repair = repair_store(config, report, say=say, may_hold_fewer=allow_fewer)
    say(f"{len(repair.recaptured)} damaged parts captured again: {', '.join(repair.recaptured) or 'none'}")
    say(f"{len(repair.captured)} missing parts captured: {', '.join(repair.captured) or 'none'}")
    for reason in repair.broken:
        say(f"not captured: {reason}")
    return repair.report
