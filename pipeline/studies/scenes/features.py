"""The tower's features of the training scenes, computed once: the tower is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.data.images import ImagePreprocessor
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.scenes.scenes import IMAGE_SIZE

BATCH_SIZE = 16


def features_of(
    model: MobileVLMForCausalLM, checkpoint: Path, images: Sequence[Path], *, file: Path
) -> Tensor:
    """Return patch features of image files, float16 'I M W'. They are kept in `file` for the next training."""
    if not file.is_file():
        preprocess = ImagePreprocessor.from_pretrained(checkpoint, aspect_ratio="pad", image_size=IMAGE_SIZE)
        model.model.vision_tower.to(memory_format=torch.channels_last)  # half the time
        parts: list[Tensor] = []
        for start in range(0, len(images), BATCH_SIZE):
            some = images[start : start + BATCH_SIZE]
            pixels = torch.stack([preprocess(image.read_bytes()) for image in some])
            parts.append(model.get_patch_features(pixels).half())
            if len(parts) % 50 == 0:
                print(f"features of {len(parts) * BATCH_SIZE}/{len(images)} images", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(save({"features": torch.cat(parts).contiguous()}))
    return load_file(file)["features"]
