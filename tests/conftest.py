"""What the tests share: paths of the fixtures, and small random models of the real classes."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from servers import s3_server
from small_experiment import Experiment, build_experiment

from pipeline.data.conversation import TokenizedSample
from pipeline.data.preparation import pad_tokens
from pipeline.data.template_preparation import expanded
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.processors import Tensors
from pipeline.models.vlm import ImageFeatures
from pipeline.positions import IGNORE_INDEX

# How long an example takes says how busy the machine is. CI runs the same examples each time: it judges a change,
# and new examples are for whoever can look at them.
settings.register_profile(
    "alignkd", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("alignkd")


# What a test that asks for one of these pays for: a teacher is captured, students are trained, a server or a process
# is started. Other slow tests carry the mark themselves.
SLOW_FIXTURES = {"experiment", "bucket", "on_accelerator"}


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark the tests that have a slow fixture, also by way of another one: `make quick` leaves them out."""
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


class Batch(dict[str, Any]):
    """A batch as `JoinCollator` makes it, without targets: `pad_tokens`'s tensors, and `images` in order."""

    def __init__(self, samples: Sequence[tuple[TokenizedSample, Sequence[Tensors]]]):
        super().__init__(pad_tokens([tokens for tokens, _ in samples], IMAGE))
        self["images"] = [image for _, images in samples for image in images]
        self.samples = samples

    def encoded_by(self, encode: Callable[[Sequence[Tensors], Sequence[int]], ImageFeatures]) -> Any:
        """Return the features of all images in order, None without images."""
        sizes = [size for of_sample in self["sizes"] for size in of_sample]
        return encode(self["images"], sizes) if sizes else None

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """The pixels of all images in order, 'I C Y X'."""
        return torch.cat([image["pixel_values"] for image in self["images"]]) if self["images"] else None

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Return the arguments of MobileVLM V2's forward."""
        named = {name: self[name] for name in ("input_ids", "attention_mask", "labels")}
        return named | {"pixel_values": self.pixel_values}

    def one_by_one(self) -> list[Batch]:
        """Return a batch of each sample, without padding."""
        return [Batch([sample]) for sample in self.samples]


@pytest.fixture(scope="session")
def fixture_folder() -> Path:
    """A checkpoint written by the original code, with its inputs and outputs."""
    return Path(__file__).parent / "fixtures" / "mobilevlm_v2_tiny"


@pytest.fixture(scope="session")
def described_checkpoint(fixture_folder, tmp_path_factory) -> Path:
    """The same checkpoint, whose config also describes its tower: it is smaller than the CLIP it names."""
    folder = tmp_path_factory.mktemp("original") / "mobilevlm"
    shutil.copytree(fixture_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = json.loads((folder / "vision_tower_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def original(described_checkpoint) -> MobileVLMForCausalLM:
    """The original code's checkpoint in our model. Tests that change it must copy it."""
    return MobileVLMForCausalLM.from_pretrained(described_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def expected(fixture_folder) -> dict[str, torch.Tensor]:
    """Inputs of the original code and what it computed from them."""
    return load_file(fixture_folder / "expected.safetensors")


@pytest.fixture(scope="session")
def original_batch(expected) -> Batch:
    """The inputs of the original code, with the 144 image tokens for each image that our preparation writes."""
    rows = zip(expected["input_ids"], expected["labels"], expected["attention_mask"].bool(), strict=True)
    samples = [expanded(ids[real].tolist(), labels[real].tolist(), 144) for ids, labels, real in rows]
    return _with_pixels(samples, expected["pixel_values"])


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with the sentencepiece `tokenizer.model` of LLaMA's kind that mistral-common ships."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(Path(spec.origin).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MobileVLMConfig]:
    """The function `small_models.tiny_config`."""
    return small_models.tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., MobileVLMForCausalLM]:
    """The function `small_models.tiny_model`."""
    return small_models.tiny_model


@pytest.fixture(scope="session")
def teacher_folder(tiny_model, tmp_path_factory) -> Path:
    """A saved small model with fewer key heads than query heads and four layers. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_model(seed=1, num_hidden_layers=4, num_key_value_heads=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Builds a batch of random prompts from layouts such as [3, IMAGE, 5]: three tokens, an image, five tokens.

    The last `answers` tokens of every sample are labels.
    """

    def build(*layouts: list[int], seed: int = 0, answers: int = 2, num_vision_tokens: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        samples = [_sample(layout, answers, num_vision_tokens, generator) for layout in layouts]
        num_images = sum(len(sample.sizes) for sample in samples)
        return _with_pixels(samples, torch.randn(num_images, 3, 56, 56, generator=generator))

    return build


def _with_pixels(samples: Sequence[TokenizedSample], pixels: torch.Tensor) -> Batch:
    """Return a batch of samples whose images in order have these pixels 'I C Y X'."""
    images = iter(pixels.split(1))
    return Batch([(sample, [{"pixel_values": next(images)} for _ in sample.sizes]) for sample in samples])


def _sample(
    layout: list[int], answers: int, num_vision_tokens: int, generator: torch.Generator
) -> TokenizedSample:
    parts = [
        torch.tensor([IMAGE]) if part == IMAGE else torch.randint(3, 96, (part,), generator=generator)
        for part in layout
    ]
    ids = torch.cat(parts).tolist()
    first_answer = len(ids) - answers
    labels = [n if at >= first_answer and n != IMAGE else IGNORE_INDEX for at, n in enumerate(ids)]
    return expanded(ids, labels, num_vision_tokens)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of an empty bucket behind S3's real API. Every test writes below a name of its own."""
    with s3_server() as url:
        yield url


@pytest.fixture(scope="session")
def experiment(tiny_model, tmp_path_factory) -> Experiment:
    """Shards, teacher, student and config of a whole experiment, and its store. Tests must not write into it."""
    from pipeline.teacher_cache.teacher import cache_teacher

    small = build_experiment(tmp_path_factory.mktemp("experiment"), tiny_model)
    cache_teacher(small.config(small.file.parent))
    return small


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Returns the tiny checkpoint of a family, written once. Tests must not write into it."""
    from tiny_families import write_checkpoint

    made = tmp_path_factory.mktemp("families")

    @functools.cache
    def of(family: str) -> Path:
        return write_checkpoint(family, made / family)

    return of


@pytest.fixture(scope="session")
def family_shards(tmp_path_factory) -> Path:
    """Shards with images of several sizes. Tests must not write into them."""
    from family_images import write_shards

    return write_shards(tmp_path_factory.mktemp("family_shards"))
