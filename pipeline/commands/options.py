"""What commands share: their options, and the config that a command line asks for."""

from __future__ import annotations

import sys
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.config.config import Config

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides of the config, such as train.learning_rate=1e-3.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AllowMismatch = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-mismatch",
        help="Field of the store's fingerprint that may differ: tokenizer, template, image_preprocessing or capture.",
    ),
]
StorePath = Annotated[
    str, typer.Argument(help="A store: runs/demo/teacher.zarr, or a URL: s3://, gs://, hf:// or https://.")
]
Targets = Annotated[str | None, typer.Option(help="Targets to keep, such as attention,logits; default: all.")]
Parts = Annotated[str | None, typer.Option(help="Parts to keep, by name; default: all.")]
Fraction = Annotated[float, typer.Option(help="Share of the parts, evenly chosen.", min=0, max=1)]


def load(config: Path, overrides: list[str] | None, print_config: bool = False) -> Config:
    """The resolved config; with --print-config it is printed and the command ends."""
    from transformers.utils import logging

    from pipeline.config.config import load_config, to_yaml

    logging.disable_progress_bar()
    settings = load_config(config, overrides or [])
    if print_config:
        print(to_yaml(settings), end="")
        raise typer.Exit()
    return settings


def load_or_stored(store: str, config: Path | None, overrides: list[str] | None) -> Config:
    """The config named, else that of stage 1, which the store carries; either with overrides."""
    if config is not None:
        return load(config, overrides)
    from cache import Store
    from pipeline.config.config import overridden
    from pipeline.inspection.sources import stored_config

    return overridden(stored_config(Store(store)), overrides or [], where=f"of {store}")


def allowing(overrides: list[str] | None, allow_mismatch: list[str] | None) -> list[str]:
    """Overrides with what --allow-mismatch says, which thus is recorded with the config."""
    allowed = [f"cache.allow_mismatch=[{','.join(allow_mismatch)}]"] if allow_mismatch else []
    return [*(overrides or []), *allowed]


def counted(things: Sized, noun: str) -> str:
    """How many there are, such as "1 shard" or "2 shards"."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def say(line: str) -> None:
    """Tell how it goes, on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def print_reasons(reasons: dict[str, int], *, where: str) -> None:
    """How many samples were rejected for each reason, and where they are listed."""
    for reason, count in reasons.items():
        print(f"  {count:,} rejected: {reason}")
    if reasons:
        print(f"  the list is in {where}")
