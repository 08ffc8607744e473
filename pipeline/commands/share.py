"""Move and copy stores: push to a URL, pull from one, slice, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import Fraction, Parts, StorePath, Targets


def push(
    store: StorePath,
    url: Annotated[
        str, typer.Argument(help="s3://bucket/teacher.zarr, gs://..., hf://datasets/user/name/teacher.zarr.")
    ],
    license: Annotated[
        str | None, typer.Option(help="The store's license for its card, such as apache-2.0.")
    ] = None,
) -> None:
    """Send a store's finished parts and a card that describes the store to a URL; rerun to resume.

    Every file's hash is compared first. What the URL already has stays as it is; a part that differs stops the push.
    """
    from pipeline.readable import readable_bytes
    from pipeline.upkeep.card import push_with_card

    pushed = push_with_card(store, url, license=license)
    sent = f"{len(pushed.sent)} parts sent ({readable_bytes(pushed.bytes)})"
    print(f"{pushed.url}: {sent}, {len(pushed.found)} found there")


def pull(
    store: StorePath,
    output: Annotated[Path, typer.Argument(help="The new store, a folder.")],
    targets: Targets = None,
    parts: Parts = None,
    fraction: Fraction = 1.0,
) -> None:
    """Copy a store from a URL: all of it, or only the files of some targets and parts; rerun to resume.

    Every file's hash is compared with the hash in the store.
    """
    slice_(store, output, targets, parts, fraction)


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
