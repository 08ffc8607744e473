"""Whose weights something was made with: digests, and signs of the files that spare computing them again."""

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
    """Digests of all tensors and of each group of them, as a store has them of its teacher; signs of the files."""
    known = checkpoint.tensor_digests(checkpoint.names())
    return {
        "digest": digest_of_tensors(known),
        "groups": whole_model_digests(checkpoint.folder, known),
        "files": _signs(checkpoint.folder),
    }


def are_the_teachers(weights: Mapping[str, Any], config: Config) -> bool:
    """Whether these, as `weights_of` has them, are the config's teacher's.

    By its files, which are read only if they were touched; where it is not, by what the stores say of theirs.
    """
    folder = _folder_here(config.teacher.model)
    if folder is None:
        return any(_are_of(weights, Store(cache.path)) for cache in config.all_caches())
    if weights.get("files") == _signs(folder):
        return True
    return weights.get("digest") == Checkpoint(str(folder)).digest()


def _are_of(weights: Mapping[str, Any], store: Store) -> bool:
    """Whether a store's teacher, as far as it was read, has these weights."""
    known, groups = store.manifest.teacher.get("digests") or {}, weights.get("groups") or {}
    return bool(known) and all(groups.get(group) == digest for group, digest in known.items())


def _folder_here(model: str) -> Path | None:
    """Where a checkpoint is on this machine; nothing is downloaded."""
    if (folder := Path(model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _signs(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of every file that may hold weights; of a link's target."""
    files = {file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)}
    states = {file.name: file.stat() for file in sorted(files)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
