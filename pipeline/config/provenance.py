"""Where an output comes from: the resolved config, versions and git commit, saved with it."""

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

from cache import without_secrets
from pipeline.config.config import Config, to_yaml
from pipeline.errors import writing

# The packages that decide numbers.
PACKAGES = ("accelerate", "numcodecs", "numpy", "pillow", "tokenizers", "torch", "transformers", "webdataset",
            "zarr")  # fmt: skip


def provenance(config: Config) -> dict[str, Any]:
    """Return the config, versions, git commit, command and time, ready for JSON. Tokens in URLs are masked."""
    return {
        "config": recorded(config),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": git_commit(),
        "command": without_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def recorded(config: Config, *sections: str) -> dict[str, Any]:
    """Return a config, or some sections of it, for a record that others may read: URLs keep no token."""
    settings = config.model_dump(mode="json", include=set(sections) or None)
    return json.loads(without_secrets(json.dumps(settings, ensure_ascii=False)))


def save_provenance(folder: Path, config: Config, **more: Any) -> None:
    """Write `config.yaml` and `provenance.json`, with `more` in it, into a run's folder.

    The first is usable as --config, so URLs are whole in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "provenance.json").write_text(json.dumps(provenance(config) | more, indent=1) + "\n")


def mark_finished(mark: Path, identity: str, config: Config, **more: Any) -> None:
    """Write the mark of finished work: the identity of its inputs, `more`, and its provenance.

    Call it last.
    """
    content = {"identity": identity} | more | {"provenance": provenance(config)}
    replace_text(mark, json.dumps(content, indent=1) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Write a file. An interruption leaves the old file or the whole new one."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with writing(file), open(unfinished, "w", encoding="utf-8") as whole:
        whole.write(text)
        whole.flush()
        os.fsync(whole.fileno())
    unfinished.replace(file)


def read_mark(mark: Path) -> dict[str, Any]:
    """Return the content of a mark; {} if it is missing or damaged."""
    try:
        return dict(json.loads(mark.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def finished_identity(mark: Path) -> str | None:
    """Return the identity in a mark; None if the mark is missing or damaged."""
    return read_mark(mark).get("identity")


def made_with(mark: Path) -> dict[str, Any]:
    """Return the config in a mark; {} if the mark is missing or damaged."""
    try:
        return dict(read_mark(mark)["provenance"]["config"])
    except (ValueError, KeyError, TypeError):
        return {}


def git_commit() -> str:
    """Return the checkout's commit, with '+changes' if its files differ from it; '' outside a checkout."""
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
