"""What is wrong with the weights of a loaded model, apart from names and shapes."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.models.vlm import VisionLanguageModel


def wrong_weights(network: Any) -> str | None:
    """Return a sentence about weights that are NaN or infinite, None if there are none."""
    loaded = (
        (name, weight) for name, weight in network.named_parameters() if not weight.is_meta
    )  # the rest is unread
    wrong = sorted(name for name, weight in loaded if not torch.isfinite(weight).all())
    if not wrong:
        return None
    return (
        f"{len(wrong)} tensors have values that are NaN or infinite, first {wrong[0]!r}; download or convert the "
        "checkpoint again"
    )


def without_projector(vlm: VisionLanguageModel) -> str | None:
    """Return a sentence if all of the vision side is frozen as tower, None if something of it would be trained."""
    if vlm.connector_names:
        return None
    modules = ", ".join(name for name, _ in vlm.network.get_encoder(modality="image").named_children())
    return (
        "no projector is found: every vision tensor lies in the tower, which is not trained; name the projector's "
        f"modules in trained_in_tower of the family's row in FAMILIES; the tower has {modules}"
    )
