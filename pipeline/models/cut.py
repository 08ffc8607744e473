"""A student cut from a teacher: some of its layers, the first units of its width, or another language model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pipeline.errors import ConfigError, building
from pipeline.models.anatomy import anatomy_of
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder, copy_processor
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm.configuration import USE_ITS_CONFIG

# Fields by which a vision part says the width of the language model that it writes for.
WIDTHS_OF_VISION = ("out_hidden_size", "projection_dim")
# Of a language model's config: what the container's own fields, tokenizer and processor decide.
NOT_OF_LANGUAGE = (
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
)


@dataclass(frozen=True)
class Cut:
    """What was made: parameters of the teacher and of the student, and what of the student is new and untrained."""

    teacher_parameters: int
    student_parameters: int
    fresh: tuple[str, ...]


def make_student(
    teacher: str,
    folder: Path,
    *,
    layers: Sequence[int] | None = None,
    width: int | None = None,
    language_model: str | None = None,
    seed: int = 0,
) -> Cut:
    """Write a student's checkpoint: the teacher's tower, projector and processor, and a smaller language model.

    `layers` keeps these decoder layers. `width` keeps the first units of every layer's width, and as many heads and
    as much of each MLP in proportion. `language_model` is a pretrained causal language model of the teacher's kind
    and vocabulary, which takes the place of the teacher's; the projector is new where its width is another one.
    Raises `ConfigError` for what does not go together, and for a folder that holds something.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} already holds files; name a new folder")
    config = read_config(checkpoint_folder(teacher))
    network = load_network(teacher, dtype="auto")
    made, weights = copy.deepcopy(config), network.state_dict()
    if language_model is not None:
        weights = _with_language_model(network, made, language_model)
    kept = list(range(made.get_text_config().num_hidden_layers)) if layers is None else list(layers)
    keep_layers(made, kept)
    if width is not None:
        _keep_width(made, width)
    with torch.random.fork_rng(devices=[]), building(f"a student of {teacher}", then=USE_ITS_CONFIG):
        torch.manual_seed(seed)
        student = AutoModelForImageTextToText.from_config(made, dtype=network.dtype)
    whole = anatomy_of(config).vision if language_model is not None else frozenset[str]()
    fresh = _fill(student, weights, prefix=anatomy_of(config).layers, layers=kept, whole=whole)
    student.save_pretrained(folder)
    copy_processor(checkpoint_folder(teacher), folder)
    return Cut(network.num_parameters(), student.num_parameters(), fresh)


def parse_layers(text: str) -> list[int]:
    """Return the numbers of a list such as "0,1,4-7". Raises `ConfigError` for anything else."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"layers: expected numbers such as 0,1,4-7, found {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def keep_layers(config: Any, layers: Sequence[int]) -> None:
    """Change a config to one of these decoder layers. Raises `ConfigError` if it has no such layer."""
    text = config.get_text_config()
    number = text.num_hidden_layers
    if not layers or any(not 0 <= layer < number for layer in layers) or len(set(layers)) < len(layers):
        raise ConfigError(
            f"layers: {', '.join(map(str, layers)) or 'none'} asked for, the language model has 0 to {number - 1}; "
            "name each layer at most once, and at least one"
        )
    for name, value in list(vars(text).items()):
        if (
            isinstance(value, list) and len(value) == number
        ):  # a value for each layer, such as its type of attention
            setattr(text, name, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)


def _keep_width(config: Any, width: int) -> None:
    """Change a config to another width, with heads and MLP in proportion."""
    text = config.get_text_config()
    before, heads = text.hidden_size, text.num_attention_heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    possible = [before * n // pairs for n in range(1, pairs + 1) if before * n % pairs == 0]
    if width not in possible:
        raise ConfigError(
            f"width: {width} asked for, the language model has {before} with {pairs} heads of keys; possible are "
            f"{', '.join(map(str, possible))}"
        )
    if getattr(text, "head_dim", None) is None:
        text.head_dim = before // heads
    text.num_attention_heads = heads * width // before
    text.num_key_value_heads = pairs * width // before
    text.intermediate_size = text.intermediate_size * width // before
    _set_width(config, before, width)


def _set_width(config: Any, before: int, width: int) -> None:
    """Write the width of the language model wherever a config has it."""
    text = config.get_text_config()
    text.hidden_size = width
    vision = getattr(config, "vision_config", None)
    for part in (vision, config):
        for name in WIDTHS_OF_VISION + (() if part is vision else ("hidden_size",)):
            if part is not None and getattr(part, name, None) == before:
                setattr(part, name, width)


def _fill(
    student: Any, weights: Mapping[str, Tensor], *, prefix: str, layers: Sequence[int], whole: Collection[str]
) -> tuple[str, ...]:
    """Fill a model with the first units of each tensor, and of layers below `prefix` with those that are kept.

    Return the names of the tensors that stay as they were: none has this name, or it is smaller. Those in `whole` are
    only taken in the same shape.
    """
    fresh: list[str] = []
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            given = weights.get(_renumbered(name, prefix, layers))
            fits = given is not None and all(a <= b for a, b in zip(tensor.shape, given.shape, strict=True))
            if given is None or not fits or (name in whole and tensor.shape != given.shape):
                fresh.append(name)
            else:
                tensor.copy_(given[tuple(slice(0, size) for size in tensor.shape)])
    student.tie_weights()
    return tuple(fresh)


def _renumbered(name: str, prefix: str, layers: Sequence[int]) -> str:
    """Return the source's name of a student's tensor: its n-th layer is the source's layers[n]."""
    if not name.startswith(prefix):
        return name
    number, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layers[int(number)]}{dot}{rest}"


def _with_language_model(network: Any, config: Any, name: str) -> dict[str, Tensor]:
    """Change a config to a pretrained language model; return the network's tensors with that model's for its own."""
    ours = config.get_text_config()
    language: Any = AutoModelForCausalLM.from_pretrained(checkpoint_folder(name), dtype=network.dtype)
    theirs = language.config
    kind = "llama" if ours is config else ours.model_type  # MobileVLM V2's config is LLaMA's with more fields
    for field, asked, found in (
        ("model_type", kind.removesuffix("_text"), theirs.model_type.removesuffix("_text")),
        ("vocab_size", ours.vocab_size, theirs.vocab_size),
    ):
        if asked != found:
            raise ConfigError(
                f"language model {name}: {field} {found!r}, the teacher's is {asked!r}; name one of its own kind, "
                "with its tokenizer"
            )
    before = ours.hidden_size
    for field, value in theirs.to_dict().items():
        if field not in NOT_OF_LANGUAGE and hasattr(ours, field):
            setattr(ours, field, value)
    _set_width(config, before, theirs.hidden_size)
    text = anatomy_of(network.config).text
    kept = {key: tensor for key, tensor in network.state_dict().items() if key not in text}
    parts = ((network.get_decoder(), language.get_decoder()),
             (network.get_output_embeddings(), language.get_output_embeddings()))  # fmt: skip
    for place, part in parts:
        [prefix] = [key for key, module in network.named_modules() if module is place]
        kept |= {f"{prefix}.{key}": tensor for key, tensor in part.state_dict().items()}
    return kept
