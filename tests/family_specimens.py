"""The specimen of a tiny family: its first layers and made-up samples."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.conformance.specimen import Specimen, specimen_of
from pipeline.data.conversation import TokenizedSample
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_tensors
from pipeline.targets.logits import LogitsTarget


def specimen_of_family(family: str, folder: Path) -> Specimen:
    """Return a specimen of `tiny_families.write_checkpoint`'s folder."""
    return (_by_hand if family == "lfm2_vl" else specimen_of)(folder)


def _by_hand(folder: Path) -> Specimen:
    """Return LFM2-VL with inputs made by hand, since its image processor needs torchvision: tiles of 16 patches."""
    config = read_config(folder)
    plan = plan_tensors(Checkpoint(str(folder)), config, {"logits": LogitsTarget()})
    network = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu")).vlm
    width = 3 * config.vision_config.patch_size**2
    generator = torch.Generator().manual_seed(0)

    def image() -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.randn(1, 16, width, generator=generator),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        }

    vision, text = [network.image_token_id] * 4, list(range(10, 22))
    rows = ([*text[:3], *vision, *text[3:]], [*vision, 11, *vision, *text], [*text, *vision, 12, 13], text)
    samples = [
        TokenizedSample(
            tuple(row), (-100,) * (len(row) - 3) + tuple(row[-3:]), (4,) * (row.count(vision[0]) // 4)
        )
        for row in rows
    ]
    return Specimen(network, samples, [[image() for _ in sample.sizes] for sample in samples], plan=plan)
