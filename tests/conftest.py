"""What the tests share: paths of the fixtures, and small random models of the real classes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_models
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from servers import s3_server
from small_experiment import Experiment, build_experiment

from pipeline.models.mobilevlm import IMAGE_TOKEN_ID as IMAGE_TOKEN_INDEX
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.positions import IGNORE_INDEX

IMAGE = IMAGE_TOKEN_INDEX

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


@dataclass(frozen=True)
class Batch:
    """Padded samples on the right, as the collator makes them: ids, mask and labels 'B S', all images in order."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor | None

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Keyword arguments of the model's forward."""
        return vars(self).copy()


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

    def build(
        *layouts: list[int], seed: int = 0, answers: int = 2, vocab_size: int = 96, image_size: int = 56
    ):
        generator = torch.Generator().manual_seed(seed)
        samples = [_sample(layout, generator, vocab_size) for layout in layouts]
        length = max(len(ids) for ids in samples)
        input_ids = torch.zeros(len(samples), length, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, ids in enumerate(samples):
            input_ids[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
            labels[row, len(ids) - answers : len(ids)] = ids[len(ids) - answers :]
        labels[input_ids == IMAGE] = IGNORE_INDEX
        num_images = int((input_ids == IMAGE).sum())
        pixels = (
            torch.randn(num_images, 3, image_size, image_size, generator=generator) if num_images else None
        )
        return Batch(input_ids, mask, labels, pixels)

    return build


def _sample(layout: list[int], generator: torch.Generator, vocab_size: int) -> torch.Tensor:
    parts = [
        torch.tensor([IMAGE]) if part == IMAGE else torch.randint(3, vocab_size, (part,), generator=generator)
        for part in layout
    ]
    return torch.cat(parts)


@pytest.fixture(scope="session")
def split_batch() -> Callable[[Batch], list[Batch]]:
    """Cuts a batch into its samples, without padding."""

    def split(batch: Batch) -> list[Batch]:
        alone, first_image = [], 0
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            num_images = int((ids == IMAGE).sum())
            images = batch.pixel_values[first_image : first_image + num_images] if num_images else None
            alone.append(Batch(ids[mask][None], mask[mask][None], labels[mask][None], images))
            first_image += num_images
        return alone

    return split


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
