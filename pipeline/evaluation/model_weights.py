"""Whose weights predictions were made with: digests, and file sizes and times that spare computing them again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache import Store
from pipeline.config.config import Config
from pipeline.models.checkpoint import WEIGHT_FILES, Checkpoint, digest_of_tensors
from pipeline.models.teacher_plan import whole_model_digests

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", *WEIGHT_FILES)


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the digest of all tensors, those of their groups (as a store has them), and the state of the files."""
    known = checkpoint.tensor_digests(checkpoint.names())
    return {
        "digest": digest_of_tensors(known),
        "groups": whole_model_digests(checkpoint.folder, known),
        "files": _file_states(checkpoint.folder),
    }


def are_the_teachers(weights: Mapping[str, Any], config: Config) -> bool:
    """Return whether weights, as from `weights_of`, are those of the config's teacher.

    Its files are read only if their sizes or times differ. Where the teacher is not on this machine, the stores'
    digests decide.
    """
    folder = _local_folder(config.teacher.model)
    if folder is None:
        return any(_are_of(weights, Store(cache.path)) for cache in config.all_caches())
    if weights.get("files") == _file_states(folder):
        return True
    return weights.get("digest") == Checkpoint(str(folder)).digest()


def _are_of(weights: Mapping[str, Any], store: Store) -> bool:
    """Whether every group of weights that the store's teacher read is among these."""
    known, groups = store.manifest.teacher.get("digests") or {}, weights.get("groups") or {}
    return bool(known) and all(groups.get(group) == digest for group, digest in known.items())


def _local_folder(model: str) -> Path | None:
    """A checkpoint's folder on this machine; nothing is downloaded."""
    if (folder := Path(model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _file_states(folder: Path) -> dict[str, list[int]]:
    """File -> [size in bytes, time of change in ns] of all that may hold weights, links followed."""
    files = {file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)}
    states = {file.name: file.stat() for file in sorted(files)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
