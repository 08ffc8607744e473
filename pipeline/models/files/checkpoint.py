"""Single tensors of a checkpoint, read without the rest: safetensors or `.bin`, sharded or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open

from pipeline.errors import ConfigError, PipelineError, building, is_of_the_machine, is_ours, reason_of
from pipeline.models.files.broken_files import named_if_broken

# In transformers' order, so that teacher and student read the same files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a config, a tokenizer, a processor and a chat template are made of.
SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
# Of a checkpoint, all that a processor is made of; `save_pretrained` writes config and weights alone.
PROCESSOR_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
                   "merges.txt", "preprocessor_config.json", "processor_config.json",
                   "video_preprocessor_config.json", "chat_template*")  # fmt: skip
ADAPTERS = "adapter_config.json"  # peft's
ZIP = b"PK\x03\x04"


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """Return the blake3 over dtype, shape and bytes of a tensor."""
    header = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return blake3(header.encode()).update(content.data).hexdigest()


def digest_of_tensors(digests: Mapping[str, str]) -> str:
    """Return one digest of many: name -> digest of a tensor."""
    return blake3("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def checkpoint_folder(name: str) -> Path:
    """Return a local folder as it is, or the downloaded snapshot of a hub id.

    Raises `ConfigError` if there is none, or if it holds LoRA adapters alone; `PipelineError` if the disk refuses.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    if (folder / ADAPTERS).is_file() and not any((folder / file).exists() for file in WEIGHT_FILES):
        raise ConfigError(
            f"{name}: LoRA adapters ({ADAPTERS}) without the weights of their base model; merge them (in peft: "
            "PeftModel, merge_and_unload, save_pretrained) and name the folder of what comes out"
        )
    return folder


def _downloaded(name: str) -> Path:
    if Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1:  # which no Hub id has
        found = "a file" if Path(name).exists() else "nothing"
        raise ConfigError(f"model {name!r}: no such local folder, found {found}; name a checkpoint's folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (ValueError, OSError) as error:  # the hub's own errors are kinds of these
        if is_of_the_machine(error) and not isinstance(error, ConnectionError):
            raise PipelineError(f"model {name!r} cannot be downloaded: {reason_of(error)}") from error
        raise ConfigError(
            f"model {name!r}: no such local folder, and the hub answered {type(error).__name__}; "
            "check the path, or the name and the network"
        ) from error


def small_files(name: str) -> Path | None:
    """Return a folder with a checkpoint's config and tokenizer, without its weights; None if there is none here."""
    if (folder := Path(name)).is_dir():
        return checkpoint_folder(name)
    if folder.is_absolute():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    except (ValueError, OSError):
        return None


def copy_processor(source: Path, target: Path) -> None:
    """Copy tokenizer, image processor and chat template of a checkpoint; not their modes, which follow the umask."""
    for file in (file for pattern in PROCESSOR_FILES for file in source.glob(pattern)):
        shutil.copyfile(file, target / file.name)


class Checkpoint:
    """The tensors of a checkpoint folder by name. `.bin` files are mapped, so that only the pages in use are read."""

    def __init__(self, name: str):
        self.folder = checkpoint_folder(name)
        self._listed_in, self._files = self._locate()

    def _locate(self) -> tuple[Path, dict[str, Path]]:
        """Return the file that lists the tensors, and the file of each tensor."""
        file = next((file for name in WEIGHT_FILES if (file := self.folder / name).is_file()), None)
        if file is None:
            raise ConfigError(
                f"{self.folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}; "
                "name a folder that holds a checkpoint"
            )
        with named_if_broken(file):
            if file.suffix == ".json":
                weight_map = json.loads(file.read_text())["weight_map"]
                return file, {name: self.folder / Path(part).name for name, part in weight_map.items()}
            return file, dict.fromkeys(_names_in(file), file)

    def names(self) -> list[str]:
        return sorted(self._files)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), file by file. Raises `ConfigError` if a tensor is missing."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise ConfigError(
                    f"{self.folder}: the checkpoint has no tensor {name!r}; use a complete checkpoint "
                    "and the config.json that belongs to it"
                )
            wanted.setdefault(self._files[name], []).append(name)
        for file, inside in wanted.items():
            with self._reading(file):
                if file.suffix == ".bin":
                    mapped = _mapped(file)
                    yield from ((name, mapped[name]) for name in inside)
                    continue
                with safe_open(file, framework="pt") as opened:
                    yield from ((name, opened.get_tensor(name)) for name in inside)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, from the headers of safetensors files."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with self._reading(file):
                if file.suffix == ".bin":
                    found |= {name: tuple(tensor.shape) for name, tensor in _mapped(file).items()}
                    continue
                with safe_open(file, framework="pt") as opened:
                    found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        return found

    def check_files(self) -> None:
        """Raise `ConfigError` or `PipelineError` naming the first file that cannot be read."""
        for file in sorted(set(self._files.values())):
            with self._reading(file):
                _names_in(file)

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        if file != self._listed_in and not file.is_file():
            raise ConfigError(
                f"{file}: no such file, but {self._listed_in.name} names it; download what is missing, too"
            )
        with named_if_broken(file):
            yield

    def digest(self, names: Iterable[str] | None = None) -> str:
        """Return the blake3 over name, dtype, shape and bytes of these tensors, or of all.

        It is equal for a `.bin` and a safetensors copy of one model.
        """
        return digest_of_tensors(self.tensor_digests(self.names() if names is None else names))

    def tensor_digests(self, names: Iterable[str]) -> dict[str, str]:
        """Return the blake3 over dtype, shape and bytes of each of these tensors."""
        return {name: digest_of_tensor(tensor) for name, tensor in self.tensors(names)}


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """As `building`, for what transformers loads from a checkpoint. If a file is at fault, name it and the cause."""
    with building(f"model {name}", then="use a complete checkpoint with its own config.json"):
        try:
            yield
        except Exception as error:
            if not is_ours(error):
                Checkpoint(str(name)).check_files()
            raise


def check_loaded(
    name: str | Path,
    *,
    mismatched: Iterable[tuple[str, Any, Any]],
    missing: Collection[str],
    unknown: Collection[str] = (),
) -> None:
    """Raise `ConfigError` naming the first tensor that transformers would leave random, or leave out."""
    for tensor, found, expected in sorted(mismatched):
        raise ConfigError(
            f"{name}: tensor {tensor!r} has shape {tuple(found)}, its config.json asks for {tuple(expected)}; "
            "use the config.json that belongs to the checkpoint"
        )
    also = f", and has {len(unknown)} that the model does not know, first {min(unknown)!r}" if unknown else ""
    if missing:
        raise ConfigError(
            f"{name}: the checkpoint lacks {len(missing)} tensors of the model, first {min(missing)!r}{also}; use a "
            "complete checkpoint with its own config.json"
        )
    if unknown:
        raise ConfigError(
            f"{name}: the checkpoint has {len(unknown)} tensors that the model does not know, first "
            f"{min(unknown)!r}; use the config.json that belongs to the checkpoint"
        )


def _names_in(file: Path) -> list[str]:
    if file.suffix == ".bin":
        return list(_mapped(file))
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.bin`. A file from before torch 1.6 is no zip and is read whole instead of mapped."""
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
