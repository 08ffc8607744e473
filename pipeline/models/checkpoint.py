"""Single tensors of a checkpoint, read without loading the rest: safetensors or `.bin`, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from pipeline.errors import ConfigError

# In the order in which transformers looks for them, so that teacher and student read the same files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def digest_of_tensors(digests: Mapping[str, str]) -> str:
    """One digest of tensors by name."""
    return blake3("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def checkpoint_folder(name: str) -> Path:
    """A local folder as it is, a hub id as its downloaded snapshot. Raises `ConfigError` with the remedy."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model {name!r}: no such local folder, and the hub answered {type(error).__name__}; "
            "check the path, or the name and the network"
        ) from error


class Checkpoint:
    """The tensors of a checkpoint folder by name; `.bin` files are mapped, so only the pages used are read."""

    def __init__(self, name: str):
        self.folder = checkpoint_folder(name)
        self._files = self._locate()

    def names(self) -> list[str]:
        return sorted(self._files)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the names asked for, file by file. Raises `ConfigError` if one is missing."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise ConfigError(
                    f"{self.folder}: the checkpoint has no tensor {name!r}; use a complete MobileVLM V2 checkpoint "
                    "and the config.json that belongs to it"
                )
            wanted.setdefault(self._files[name], []).append(name)
        for file, inside in wanted.items():
            with named_if_broken(file):
                yield from _read(file, inside)

    def digest(self, names: Iterable[str] | None = None) -> str:
        """blake3 over name, dtype, shape and bytes of tensors, of all if none are named.

        Equal for `.bin` and safetensors of one model.
        """
        return digest_of_tensors(self.tensor_digests(self.names() if names is None else names))

    def tensor_digests(self, names: Iterable[str]) -> dict[str, str]:
        """blake3 over dtype, shape and bytes of each tensor named."""
        return {name: _tensor_digest(tensor) for name, tensor in self.tensors(names)}

    def _locate(self) -> dict[str, Path]:
        file = next((file for name in WEIGHT_FILES if (file := self.folder / name).is_file()), None)
        if file is None:
            raise ConfigError(
                f"{self.folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}; "
                "name a folder that holds a MobileVLM V2 checkpoint"
            )
        with named_if_broken(file):
            if file.suffix == ".json":
                weight_map = json.loads(file.read_text())["weight_map"]
                return {name: self.folder / Path(part).name for name, part in weight_map.items()}
            return dict.fromkeys(_names_in(file), file)


@contextmanager
def named_if_broken(file: Path) -> Iterator[None]:
    """Whatever a reader says of a missing, cut or foreign file becomes one sentence that names it."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ConfigError(
            f"{file}: not readable as weights ({type(error).__name__}); copy or download the checkpoint again"
        ) from error


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_mapped(file))
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _read(file: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    if file.suffix == ".bin":
        mapped = _mapped(file)
        yield from ((name, mapped[name]) for name in names)
        return
    with safe_open(file, framework="pt") as tensors:
        yield from ((name, tensors.get_tensor(name)) for name in names)


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def _tensor_digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
    return blake3(header.encode()).update(content.data).hexdigest()
