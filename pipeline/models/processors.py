"""Processors of checkpoints: text and images to the inputs of a model, without torchvision.

A processor writes each image as a run of tokens in the text, and turns its pixels into tensors. Both depend on this
image alone, so they can be made one image at a time (`expansion_of`) and be put together later (image_batches.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from pipeline.errors import ConfigError, building, reason_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
PARTS = {"image_processor", "tokenizer"}
# What a processor returns about the text. Everything else that it returns is about the images.
OF_TEXT = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "text_replacement_offsets",
}

Tensors = dict[str, torch.Tensor]


class ImagesOnly(ProcessorMixin):
    """Makes a processor do without its video part, which needs torchvision.

    Stands before a family's own class among the bases of a class that `_images_only` makes.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the names of the parts."""
        return [name for name in super().get_attributes() if name != "video_processor"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept every part: transformers' Auto classes made them.

        The original imports mistral_common if that is there, and fails if that package lacks a dependency.
        """
        return type(argument)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation; SmolVLM's own method reads settings of the video part."""
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__bases__[1], vars(self))  # a made class has no name to pickle by


@cache
def _images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    return type(kind.__name__, (ImagesOnly, kind), {})


def _restored(kind: type[ProcessorMixin], state: dict[str, Any]) -> ProcessorMixin:
    processor = object.__new__(_images_only(kind))
    vars(processor).update(state)
    return processor


def load_processor(folder: Path) -> Any:
    """Load the processor of a checkpoint folder, with an image processor that needs PIL alone if there is one.

    So pixels do not depend on whether torchvision is installed. Code that came with the checkpoint never runs. Raises
    `ConfigError` for a folder without tokenizer or image processor, for a kind of model without processor, and for a
    missing package.
    """
    kind = _processor_class(folder)
    _check_files(folder)
    with _loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with _loading(folder, "image processor"):
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    parts = {"tokenizer": tokenizer, "image_processor": images}
    with _loading(folder, "processor"):
        settings, _ = kind.get_processor_dict(folder)
        try:
            made = kind.from_args_and_dict([], settings, **parts, video_processor=None)
        except AttributeError as error:
            if "video_processor" not in str(error):
                raise
            raise ConfigError(
                f"{folder}: {kind.__name__} reads settings of its video part, which needs torchvision; use another "
                "family"
            ) from error
    # transformers pairs parts with names by position, and some families have the video part first.
    vars(made).update(parts)
    return made


@contextmanager
def _loading(folder: Path, part: str) -> Iterator[None]:
    """Turn the error of a part that cannot be loaded into one sentence."""
    with building(f"{folder}: the {part}", then="use all files of the published checkpoint"):
        try:
            yield
        except ImportError as error:
            reason = reason_of(error).partition(". ")[0]
            raise ConfigError(
                f"{folder}: the {part} needs a package: {reason}; install that package"
            ) from error


def _processor_class(folder: Path) -> type[ProcessorMixin]:
    with building(f"{folder}: config.json", then="name a folder that holds a checkpoint"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None:
        raise ConfigError(
            f"{folder}: a processor was asked for, but transformers has none for models of type {config.model_type!r}"
        )
    with _loading(folder, "processor"):  # a class whose packages are missing raises at its first use
        kind = _images_only(kind)
        foreign = set(kind.get_attributes()) - PARTS
    if foreign:
        raise ConfigError(
            f"{folder}: {kind.__name__} has parts that are neither text nor images ({', '.join(sorted(foreign))}); "
            "use a model that takes text and images alone"
        )
    return kind


def _check_files(folder: Path) -> None:
    """Raise `ConfigError` if a part has no file. From such a folder transformers may build an empty tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{folder}: no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}; copy the tokenizer of the "
            "published checkpoint"
        )
    if not any(_describes_images(folder / name) for name in IMAGE_FILES):
        raise ConfigError(
            f"{folder}: no image processor, expected {IMAGE_FILES[0]}; copy it from the published checkpoint"
        )


def _describes_images(file: Path) -> bool:
    if not file.is_file() or file.name == IMAGE_FILES[0]:
        return file.is_file()
    with building(str(file), then="copy it from the published checkpoint"):
        return "image_processor" in json.loads(file.read_text())


def expansion_of_size(processor: Any, size: tuple[int, int]) -> tuple[str, Tensors]:
    """Return `expansion_of` a blank image, whose tensors have the right shapes but no meaning.

    It leaves out what changes values alone, which is most of the time: 20 ms instead of 140 for InternVL's 12 tiles.
    """
    blank = Image.new("RGB", size)
    return expansion_of(
        processor, blank, do_rescale=False, do_normalize=False, resample=Image.Resampling.NEAREST
    )


def expansion_of(processor: Any, image: Image.Image, **settings: Any) -> tuple[str, Tensors]:
    """Return the text that stands for an image in the model's input, and the tensors of its pixels.

    The text depends on the image's size alone. Tokenise it together with its surroundings, never alone: a newline at
    its border may become one token with another.
    """
    inputs = processor(
        text=[processor.image_token],
        images=[image],
        return_text_replacement_offsets=True,
        return_tensors="pt",
        **settings,
    )
    if "text_replacement_offsets" not in inputs:
        raise ConfigError(
            f"{type(processor).__name__} does not return the text that stands for an image "
            "(text_replacement_offsets); use another family, or a release of transformers where it does"
        )
    [[replaced]] = inputs["text_replacement_offsets"]
    return replaced["replacement"], {name: value for name, value in inputs.items() if name not in OF_TEXT}
