"""Make stores from stores, and clean up after writers that died: slice, merge, gc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Fraction, Parts, StorePath, Targets


def slice_(
    store: StorePath,
    output: Annotated[Path, typer.Argument(help="The new store.")],
    targets: Targets = None,
    parts: Parts = None,
    fraction: Fraction = 1.0,
) -> None:
    """Copy some targets or some parts of a store into a new store; rerun to resume.

    Stage 2 reads the new store with a config whose `targets` are the copied ones.
    """
    from cache import Store
    from pipeline.upkeep.slices import copy_store, described

    print(described(copy_store(Store(store), output, targets=targets, parts=parts, fraction=fraction)))


def merge(
    stores: Annotated[list[str], typer.Argument(help="Stores of one fingerprint, then the new store.")],
) -> None:
    """Copy the parts of several stores with the same fingerprint into a new store; rerun to resume."""
    from cache import Store, merge_stores

    if len(stores) < 3:
        raise typer.BadParameter("give at least two stores, and then the new one")
    *sources, output = stores
    made = merge_stores([Store(path) for path in sources], output)
    print(f"{output}: {len(made.parts)} parts, {len(made):,} samples of {len(sources)} stores")


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
