"""Options that several commands share, and how a command reads its config."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.config.config import Config

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config, such as configs/demo.yaml.")]
StoredConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Config to use in place of stage 1's, which the store holds."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides of the config, such as train.learning_rate=1e-3.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved config and stop.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace trainings that have other settings.")]
AllowFewer = Annotated[
    bool, typer.Option("--allow-fewer", help="Allow what is replaced to hold fewer samples than before.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StorePath = Annotated[
    str, typer.Argument(help="A store: runs/demo/teacher.zarr, or a URL: s3://, gs://, hf:// or https://.")
]
Targets = Annotated[str | None, typer.Option(help="Targets to keep, such as attention,logits; default: all.")]
Parts = Annotated[str | None, typer.Option(help="Parts to keep, by name; default: all.")]
Fraction = Annotated[float, typer.Option(help="Share of the parts, evenly chosen.", min=0, max=1)]


def load(config: Path, overrides: list[str] | None, print_config: bool = False) -> Config:
    """Return the resolved config. With --print-config, print it and end the command."""
    from transformers.utils import logging

    from pipeline.config.config import load_config, to_yaml

    logging.disable_progress_bar()
    settings = load_config(config, overrides or [])
    if print_config:
        print(to_yaml(settings), end="")
        raise typer.Exit()
    return settings


def load_or_stored(store: str, config: Path | None, overrides: list[str] | None) -> Config:
    """Return the config in the file, or without a file the one that stage 1 left in the store."""
    if config is not None:
        return load(config, overrides)
    from cache import Store
    from pipeline.config.config import overridden
    from pipeline.inspection.sources import stored_config

    return overridden(stored_config(Store(store)), overrides or [], where=f"of {store}")


def show(found: Any, describe: Callable[[Any], str], *, as_json: bool) -> None:
    """Print a result on stdout, in words or as JSON."""
    print(json.dumps(found.to_json(), indent=1) if as_json else describe(found))


def fail_unless(sound: bool) -> None:
    """End the command with exit code 1 unless what it checked is sound."""
    if not sound:
        raise typer.Exit(1)


def counted(things: Sized, noun: str) -> str:
    """Return a number and its noun, such as "1 shard" or "2 shards"."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def say(line: str) -> None:
    """Report progress on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def print_reasons(reasons: Mapping[str, int], *, where: str) -> None:
    """Print how many samples were rejected for each reason, and where they are listed."""
    for reason, count in reasons.items():
        print(f"  {count:,} rejected: {reason}")
    if reasons:
        print(f"  the list is in {where}")
