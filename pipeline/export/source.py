"""The checkpoint that is exported, and what is known of where it comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import digest_of
from pipeline.errors import ConfigError
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import PROCESSOR_FILES, Checkpoint, checkpoint_folder

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder, its config, the digest of its tensors, and the provenance of its training or {}.

    `name` is a short name for people. `licence` is what the user says of the result: no file of a checkpoint does.
    """

    name: str
    folder: Path
    config: Any
    digest: str
    origin: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None

    @classmethod
    def of(cls, model: str, *, licence: str | None = None) -> Source:
        """Find a checkpoint: its folder, a hub id, or the folder of a training, whose `model` is meant.

        Raises `ConfigError` if there is none, or if the training did not end.
        """
        folder = Path(model)
        if (folder / PROVENANCE).is_file() and not (folder / "config.json").is_file():
            if not (folder / "model" / "config.json").is_file():
                raise ConfigError(
                    f"{folder}: a training that wrote no model yet; finish it with `alignkd distill`, or name one of "
                    "its checkpoints"
                )
            folder = folder / "model"
        found = checkpoint_folder(str(folder) if folder.is_dir() else model)
        named = folder.resolve() if folder.is_dir() else folder  # `.` has no name
        return cls(
            name=named.parent.name if named.name == "model" else named.name,
            folder=found,
            config=read_config(found),
            digest=Checkpoint(str(found)).digest(),
            origin=_origin(found),
            licence=licence,
        )

    @property
    def other_digest(self) -> str:
        """A digest of what else an export is made of: config, tokenizer, a tower that lies elsewhere."""
        found = {file.name: blake3(file.read_bytes()).hexdigest() for file in self._other_files()}
        tower = getattr(self.config, "mm_vision_tower", None)
        if (
            tower
            and Path(tower).is_dir()
            and not any("vision_tower" in n for n in Checkpoint(str(self.folder)).names())
        ):
            found["mm_vision_tower"] = Checkpoint(tower).digest()
        return digest_of(found)

    def _other_files(self) -> list[Path]:
        patterns = ("config.json", *PROCESSOR_FILES)
        return sorted({file for pattern in patterns for file in self.folder.glob(pattern) if file.is_file()})

    def check_is_not(self, path: Path) -> None:
        """Raise `ConfigError` if a folder to be written is that of the checkpoint."""
        if path.resolve() == self.folder.resolve():
            raise ConfigError(f"{path} is the checkpoint itself; name another folder")


def _origin(folder: Path) -> dict[str, Any]:
    """Return the provenance that `alignkd distill` left beside the model; {} if there is none."""
    try:
        return dict(json.loads((folder.parent / PROVENANCE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}
