"""What a store holds and costs, and whether it is sound: info, verify, check, plan, gc."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    AllowFewer,
    AsJson,
    ConfigFile,
    Overrides,
    StoredConfig,
    StorePath,
    fail_unless,
    load,
    load_or_stored,
    say,
    show,
)

if TYPE_CHECKING:
    from cache import Report
    from pipeline.config.config import Config


def info(store: StorePath, as_json: AsJson = False) -> None:
    """Describe a store: teacher, targets with their stated errors, samples, rejects, bytes, provenance.

    Of stored logits, those of up to 256 samples are read: they say how often the teacher agrees with the labels.
    """
    from pipeline.upkeep.describe import describe_info
    from pipeline.upkeep.information import inform

    show(inform(store), describe_info, as_json=as_json)


def verify(
    store: StorePath,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every file and decode every value.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Recapture damage and gaps; needs --config.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Config of stage 1, for --fix.")
    ] = None,
    allow_fewer: AllowFewer = False,
    as_json: AsJson = False,
) -> None:
    """Look for damage: missing or unfinished parts, flipped bytes, wrong counts; exit code 1 if there is any.

    With --fix, only damaged and missing parts are captured again from their shards. A damaged part is replaced once
    the new one is whole. The report lists what was found and done; the exit code is that of a second verification.
    """
    from cache import verify as verify_store
    from pipeline.progress import Progress

    if fix != (config is not None) or (overrides and not fix):
        raise typer.BadParameter(
            "--fix and --config go together, and overrides with them: the teacher that captures again is the config's"
        )
    deep = deep or fix
    with Progress("verify", unit="bytes", doing="reading metadata") as progress:
        report = verify_store(store, deep=deep, progress=progress)
    if config is not None and not report.is_sound:
        report = _fixed(load(config, overrides), report, allow_fewer)

    def describe(report: Report) -> str:
        from pipeline.readable import readable_bytes

        depth = "" if deep else " (contents not read; --deep does)"
        return "\n".join([
            *(f"{problem.kind}: {problem.file}: {problem.detail}" for problem in report.problems),
            f"{store}: {report.num_problems} problems in {report.parts} parts, {report.samples:,} samples, "
            f"{report.files} files, {readable_bytes(report.bytes)}{depth}",
        ])  # fmt: skip

    show(report, describe, as_json=as_json)
    fail_unless(report.is_sound)


def _fixed(config: Config, report: Report, allow_fewer: bool) -> Report:
    """Repair what the report finds, with a line on stderr for each step; return the repaired store's report."""
    from pipeline.upkeep.repair import repair_store

    for problem in report.problems:
        say(f"found {problem.kind}: {problem.file}: {problem.detail}")
    repair = repair_store(config, report, say=say, may_hold_fewer=allow_fewer)
    say(f"{len(repair.recaptured)} damaged parts captured again: {', '.join(repair.recaptured) or 'none'}")
    say(f"{len(repair.captured)} missing parts captured: {', '.join(repair.captured) or 'none'}")
    for reason in repair.broken:
        say(f"not captured: {reason}")
    return repair.report


def check(
    store: StorePath,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples to capture again.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed that chooses the samples.")] = 0,
    losses: Annotated[bool, typer.Option(help="Also compare the student's losses and gradients.")] = True,
    config: StoredConfig = None,
    as_json: AsJson = False,
) -> None:
    """Capture some samples again with the live teacher; exit code 1 if a value is beyond its stated error.

    For a store without logits, a stub of the teacher is enough: a few percent of its weights. With logits a warning
    says if the teacher's answers hardly depend on the images.
    """
    from pipeline.teacher_cache.blindness import warn_of_blindness
    from pipeline.upkeep.check import check_store
    from pipeline.upkeep.describe import describe_check

    settings = load_or_stored(store, config, overrides)
    # The store may have moved since it was made.
    settings = settings.model_copy(update={"cache": settings.one_cache.model_copy(update={"path": store})})
    found = check_store(settings, num_samples=samples, seed=seed, with_losses=losses)
    show(found, describe_check, as_json=as_json)
    warn_of_blindness(found.blindness, settings.teacher, then="The store holds what such a teacher says.")
    fail_unless(found.is_sound)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[
        int | None, typer.Option(min=8, help="Samples to probe, from up to eight shards; default: 256.")
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Room for the store, such as 500GB: the first settings that fit are chosen."),
    ] = None,
    on_paper: Annotated[
        bool, typer.Option("--on-paper", help="Read only config.json of both models; measure nothing.")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="For --on-paper, once for each assumption to change, such as tflops=125; the result lists all.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a store before anything is written: bytes by target, hours, the disk, store or recompute.

    Real samples are probed with the real teacher on this machine. Exit code 1 if the store does not fit on the disk,
    or if all probed samples are rejected.
    With --on-paper neither shards nor weights are needed: bytes and hours are computed from the shapes.
    """
    if on_paper and (samples, max_bytes) != (None, None):
        raise typer.BadParameter("--samples and --max-bytes are of a probe, which --on-paper does not make")
    if assume and not on_paper:
        raise typer.BadParameter("--assume belongs to --on-paper; without it samples are measured")
    settings = load(config, overrides)
    if on_paper:
        _plan_on_paper(settings, assume or [], as_json=as_json)
        return
    from cache import local
    from pipeline.progress import Progress
    from pipeline.upkeep.describe import describe_plan, parse_bytes
    from pipeline.upkeep.plan import plan_store, plan_within

    local(settings.one_cache.path, doing="written by stage 1")
    limit, num_samples = None if max_bytes is None else parse_bytes(max_bytes), samples or 256
    with Progress("plan", unit="samples", doing="comparing teacher and student") as progress:
        if limit is None:
            found = plan_store(settings, num_samples=num_samples, progress=progress)
        else:
            found = plan_within(settings, max_bytes=limit, num_samples=num_samples, progress=progress)
    show(found, describe_plan, as_json=as_json)
    fail_unless(found.fits and found.is_known)


def _plan_on_paper(config: Config, assume: list[str], *, as_json: bool) -> None:
    from pipeline.upkeep.assumptions import parse_assumptions
    from pipeline.upkeep.on_paper import describe_on_paper, plan_on_paper

    show(plan_on_paper(config, parse_assumptions(assume)), describe_on_paper, as_json=as_json)


def gc(
    store: StorePath,
    hours: Annotated[
        float | None,
        typer.Option(min=0, help="Also remove leftovers of other hosts that are unchanged for this long."),
    ] = None,
) -> None:
    """Remove what dead writers left in a store's tmp/; finished parts are never touched."""
    from cache import Store, local, sweep_dead, sweep_old

    path = local(Store(store).path, doing="cleaned up")
    removed = sweep_dead(path) + ([] if hours is None else sweep_old(path, seconds=3600 * hours))
    for name in removed:
        print(name)
    print(f"{store}: {len(removed)} unfinished parts removed")
