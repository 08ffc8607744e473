"""Share a store: push it to a URL with a card; pull all of it, or some targets and parts."""

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
    from pipeline.upkeep.card import push_with_card
    from pipeline.upkeep.describe import readable_bytes

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
    from pipeline.commands.reshape import slice_

    slice_(store, output, targets, parts, fraction)
