"""A model to be checked: the first layers of a checkpoint, and made-up samples of its processor."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config.config import DataConfig
from pipeline.data.conversation import TokenizedSample
from pipeline.data.load_preparation import preparation_of
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.errors import BadSample
from pipeline.models.anatomy import anatomy_of
from pipeline.models.configuration import read_config
from pipeline.models.cut import keep_layers
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.models.mobilevlm.tokenizer import template_of
from pipeline.models.processors import Tensors
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import TeacherPlan, plan_tensors
from pipeline.models.vlm import ImageFeatures, VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.targets.logits import LogitsTarget

ATTENTIONS = 2  # layers with attention that are loaded: the second one reads what the first one made
SIZES = ((96, 64), (48, 112), (64, 64))  # of the images, width and height
CONVERSATIONS = {
    "one image": (1, ["<image>\nWhat is in the picture?", "A red square."]),
    "two images": (2, ["<image>\n<image>\nWhich one is larger?", "The first."]),
    "a late image": (1, ["What do you know?", "A little.", "And of this? <image>", "Nothing."]),
    "text alone": (0, ["Say a word.", "Word."]),
}


@dataclass(frozen=True)
class Specimen:
    """A model, made-up samples, the pixel inputs of their images, and why samples of some kinds could not be made."""

    vlm: VisionLanguageModel
    samples: Sequence[TokenizedSample]
    images: Sequence[Sequence[Tensors]]
    refused: tuple[str, ...] = ()
    plan: TeacherPlan | None = None

    @property
    def num_attentions(self) -> int:
        """How many layers with attention the model has."""
        return len(anatomy_of(self.vlm.config).attention)

    def batch(self, chosen: Sequence[int] | None = None, *, on_the_left: bool = False) -> dict[str, Any]:
        """Return samples of these numbers as a batch, all of them by default."""
        samples = [self.samples[n] for n in self._numbers(chosen)]
        return pad_tokens(samples, self.vlm.image_token_id, on_the_left=on_the_left)

    def pixels(self, chosen: Sequence[int] | None = None) -> list[Tensors]:
        """Return the pixel inputs of all images of these samples, in order."""
        return [image for n in self._numbers(chosen) for image in self.images[n]]

    def features(self, chosen: Sequence[int] | None = None) -> ImageFeatures | None:
        """Return the projected features of all images of these samples, in order."""
        sizes = [size for n in self._numbers(chosen) for size in self.samples[n].sizes]
        return self.vlm.encode(self.pixels(chosen), sizes) if sizes else None

    def _numbers(self, chosen: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.samples)) if chosen is None else chosen


def specimen_of(folder: Path) -> Specimen:
    """Return the first layers of a checkpoint, in float32 on the CPU. Raises what loading it would raise."""
    checkpoint = Checkpoint(str(folder))
    config = first_layers(read_config(checkpoint.folder, let_in_only=False))
    template = template_of(checkpoint.folder) if isinstance(config, MobileVLMConfig) else "chat"
    data = DataConfig(shards="", template=template)
    preparation = preparation_of(checkpoint.folder, config, data)
    samples, images, refused = made_up_samples(preparation)
    plan = plan_tensors(checkpoint, config, {"logits": LogitsTarget()})
    teacher = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
    return Specimen(teacher.vlm, samples, images, tuple(refused), plan)


def first_layers(config: Any) -> Any:
    """Return the config of a model that ends with the second layer that has attention."""
    layer_of = anatomy_of(config).layer_of[:ATTENTIONS]
    cut = copy.deepcopy(config)
    keep_layers(cut, range(layer_of[-1] + 1))
    return cut


def made_up_samples(
    preparation: Preparation,
) -> tuple[list[TokenizedSample], list[list[Tensors]], list[str]]:
    """Return a sample of each kind with the pixel inputs of its images, and the kinds that the template refuses."""
    samples, images, refused = [], [], []
    for kind, (num_images, texts) in CONVERSATIONS.items():
        files = [_noise(*size, seed=number) for number, size in enumerate(SIZES[:num_images])]
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        try:
            samples.append(preparation.tokenize(turns, preparation.sizes_of(files)))
        except BadSample as error:
            refused.append(f"{kind} ({error.reason})")
            continue
        images.append([preparation.preprocess(file) for file in files])
    return samples, images, refused


def _noise(width: int, height: int, *, seed: int) -> bytes:
    """Return an image file of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def answers_of(batch: dict[str, Any]) -> torch.Tensor:
    """Return the positions that predict an answer's token: bool 'B S'."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1))
