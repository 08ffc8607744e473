"""Where an output comes from: resolved config, versions and git commit, saved beside it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.config.config import Config, to_yaml
from pipeline.errors import writing

PACKAGES = (
    "accelerate",
    "numcodecs",
    "numpy",
    "pillow",
    "tokenizers",
    "torch",
    "transformers",
    "webdataset",
    "zarr",
)


def provenance(config: Config) -> dict[str, Any]:
    """JSON-ready: config, versions of Python and of the packages that decide numbers, commit, command, time."""
    return {
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "command": " ".join(Path(part).name if n == 0 else part for n, part in enumerate(sys.argv)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save_provenance(folder: Path, config: Config, **more: Any) -> None:
    """Write `config.yaml` (usable as --config) and `provenance.json`, with `more` in it, into a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "provenance.json").write_text(json.dumps(provenance(config) | more, indent=1) + "\n")


def finished_identity(mark: Path) -> str | None:
    """What the mark of finished work was made from; None if there is none, or a kill cut it."""
    return read_mark(mark).get("identity")


def made_with(mark: Path) -> dict[str, Any]:
    """The config in the mark of finished work; {} if there is none, or a kill cut it."""
    try:
        return dict(read_mark(mark)["provenance"]["config"])
    except (ValueError, KeyError, TypeError):
        return {}


def read_mark(mark: Path) -> dict[str, Any]:
    """All that the mark of finished work says; {} if there is none, or a kill cut it."""
    try:
        return dict(json.loads(mark.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def mark_finished(mark: Path, identity: str, config: Config, **more: Any) -> None:
    """Write the mark beside finished work, last: what it was made from, and where it comes from."""
    said = {"identity": identity} | more | {"provenance": provenance(config)}
    unfinished = mark.with_name(f"{mark.name}.{os.getpid()}")
    with writing(mark):
        unfinished.write_text(json.dumps(said, indent=1) + "\n")
        unfinished.replace(mark)  # a kill leaves a whole mark or none


def git_commit() -> str:
    """The checkout's commit, with '+changes' if the working tree differs from it; '' outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
