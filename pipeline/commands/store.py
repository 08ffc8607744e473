"""What a store holds, and whether it is whole: info, verify."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, StorePath


def info(store: StorePath, as_json: AsJson = False) -> None:
    """What a store holds: teacher, targets with their stated errors, samples, rejects, bytes, provenance."""
    from cache import summarise

    summary = summarise(store)
    if as_json:
        print(json.dumps(summary.to_json(), indent=1))
        return
    from pipeline.describe import describe_store

    print(describe_store(summary))


def verify(
    store: StorePath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also hash every file and decode every value.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for damage: missing or unfinished parts, flipped bytes, wrong counts; exit code 1 if there is any."""
    from cache import verify as verify_store
    from pipeline.describe import readable_bytes

    report = verify_store(store, deep=deep)
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        for problem in report.problems:
            print(f"{problem.kind}: {problem.file}: {problem.detail}")
        depth = "" if deep else " (contents not read; --deep does)"
        print(
            f"{store}: {len(report.problems)} problems in {report.parts} parts, {report.samples:,} samples, "
            f"{report.files} files, {readable_bytes(report.bytes)}{depth}"
        )
    if not report.is_sound:
        raise typer.Exit(1)
