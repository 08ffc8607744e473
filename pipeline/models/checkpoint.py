"""Single tensors of a checkpoint, read without loading the rest: safetensors or `.bin`, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open

from pipeline.errors import ConfigError, PipelineError, building, is_of_the_machine, is_ours, reason_of
from pipeline.models.broken_files import named_if_broken

# In the order in which transformers looks for them, so that teacher and student read the same files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTERS = "adapter_config.json"  # peft's
ZIP = b"PK\x03\x04"


def digest_of_tensors(digests: Mapping[str, str]) -> str:
    """One digest of tensors by name."""
    return blake3("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def checkpoint_folder(name: str) -> Path:
    """A local folder as it is, a hub id as its downloaded snapshot. Raises `ConfigError` with the remedy."""
    folder = Path(name)
    folder = folder if folder.is_dir() else _downloaded(name)
    if (folder / ADAPTERS).is_file() and not any((folder / file).exists() for file in WEIGHT_FILES):
        raise ConfigError(
            f"{name}: LoRA adapters ({ADAPTERS}) without the weights of their base model; merge them (in peft: "
            "PeftModel, merge_and_unload, save_pretrained) and name the folder of what comes out"
        )
    return folder


def small_files(name: str) -> Path | None:
    """A folder with a checkpoint's config and tokenizer, of a hub id these alone; None if it cannot be had here."""
    if (folder := Path(name)).is_dir():
        return checkpoint_folder(name)
    if folder.is_absolute():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None


def _downloaded(name: str) -> Path:
    if Path(name).is_absolute() or Path(name).exists():
        found = "a file" if Path(name).exists() else "nothing"
        raise ConfigError(f"model {name!r}: no such local folder, found {found}; name a checkpoint's folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if is_of_the_machine(error) and not isinstance(error, ConnectionError):
            raise PipelineError(f"model {name!r} cannot be downloaded: {reason_of(error)}") from error
        raise ConfigError(
            f"model {name!r}: no such local folder, and the hub answered {type(error).__name__}; "
            "check the path, or the name and the network"
        ) from error


class Checkpoint:
    """The tensors of a checkpoint folder by name; `.bin` files are mapped, so only the pages used are read."""

    def __init__(self, name: str):
        self.folder = checkpoint_folder(name)
        self._listed_in, self._files = self._locate()

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
            with self._reading(file):
                yield from _read(file, inside)

    def check_files(self) -> None:
        """Raise `ConfigError`, or `PipelineError`, naming the first of the files that cannot be read."""
        for file in sorted(set(self._files.values())):
            with self._reading(file):
                _names_in(file)

    def digest(self, names: Iterable[str] | None = None) -> str:
        """blake3 over name, dtype, shape and bytes of tensors, of all if none are named.

        Equal for `.bin` and safetensors of one model.
        """
        return digest_of_tensors(self.tensor_digests(self.names() if names is None else names))

    def tensor_digests(self, names: Iterable[str]) -> dict[str, str]:
        """blake3 over dtype, shape and bytes of each tensor named."""
        return {name: _tensor_digest(tensor) for name, tensor in self.tensors(names)}

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        if file != self._listed_in and not file.is_file():
            raise ConfigError(
                f"{file}: no such file, but {self._listed_in.name} names it; download what is missing, too"
            )
        with named_if_broken(file):
            yield

    def _locate(self) -> tuple[Path, dict[str, Path]]:
        file = next((file for name in WEIGHT_FILES if (file := self.folder / name).is_file()), None)
        if file is None:
            raise ConfigError(
                f"{self.folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}; "
                "name a folder that holds a MobileVLM V2 checkpoint"
            )
        with named_if_broken(file):
            if file.suffix == ".json":
                weight_map = json.loads(file.read_text())["weight_map"]
                return file, {name: self.folder / Path(part).name for name, part in weight_map.items()}
            return file, dict.fromkeys(_names_in(file), file)


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """As `building`, for what transformers reads of a checkpoint; a file at fault is named, with the cause."""
    with building(f"model {name}", then="use a complete MobileVLM V2 checkpoint with its own config.json"):
        try:
            yield
        except Exception as error:
            if not is_ours(error):
                Checkpoint(str(name)).check_files()
            raise


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
    """The tensors of a `.bin`. One of before torch 1.6 is no zip, cannot be mapped, and is read whole each time."""
    with file.open("rb") as opened:
        is_zip = opened.read(len(ZIP)) == ZIP
    tensors = torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True)
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{file}: {name!r} in it is no tensor but of type {type(value).__name__}; save the state "
                "dict itself, tensors by name"
            )
    return tensors


def _tensor_digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
    return blake3(header.encode()).update(content.data).hexdigest()
