"""Stores made of stores, and cleaning up after writers: slice, merge, gc."""

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
    """A new store with some of the targets, or some of the parts, of another; rerun to go on where it stopped.

    Stage 2 reads it with a config whose `targets` are those that are kept.
    """
    from cache import Store
    from pipeline.upkeep.slices import copy_store, described

    print(described(copy_store(Store(store), output, targets=targets, parts=parts, fraction=fraction)))


def merge(
    stores: Annotated[list[str], typer.Argument(help="Stores of one fingerprint, then the new store.")],
) -> None:
    """A new store with the parts of several that were made alike; rerun to go on where it stopped."""
    from cache import Store, merge_stores

    if len(stores) < 3:
        raise typer.BadParameter("give at least two stores, and then the new one")
    *sources, output = stores
    made = merge_stores([Store(path) for path in sources], output)
    print(f"{output}: {len(made.parts)} parts, {len(made):,} samples of {len(sources)} stores")


def gc(
    store: StorePath,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Also what other hosts left and nothing touched for so long.")
    ] = None,
) -> None:
    """Remove what writers that died left in a store's tmp/; finished parts are never touched."""
    from cache import Store, local, sweep_dead, sweep_old

    path = local(Store(store).path, doing="cleaned up")
    removed = sweep_dead(path) + ([] if hours is None else sweep_old(path, seconds=3600 * hours))
    for name in removed:
        print(name)
    print(f"{store}: {len(removed)} unfinished parts removed")
