"""Whether this build of llama.cpp computes a CLIP tower rightly, or with the known defect of its class token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.export.llama_cpp.library import build_name
from pipeline.export.llama_cpp.process import LlamaCpp, Settings
from pipeline.export.torch_model import relative_error
from pipeline.models.mobilevlm import MobileVLMForCausalLM

# Relative errors of image embeddings, rms over rms, by the type of the tower's matrices.
EMBEDDINGS_LIMIT = {"f16": 0.005, "q8_0": 0.03}
ISSUE = "https://github.com/ggml-org/llama.cpp/issues/25814"
WRONG = (
    f"this build of llama.cpp ({{build}}) computes CLIP wrongly ({ISSUE}): its embeddings are those of a class token "
    "behind the patches, {error:.0%} off. Verified with the class token put first; the card says what to do."
)
RIGHT = "this build of llama.cpp ({build}) computes CLIP as PyTorch does: no workaround is needed with it."


@torch.no_grad()
def with_right_eyes(
    settings: Settings, network: MobileVLMForCausalLM, square: NDArray[np.uint8], pixels: torch.Tensor
) -> tuple[Settings, str]:
    """Return settings with which the tower is right, and a sentence on what stock llama.cpp computes.

    `square` uint8 'Y X C' and `pixels` 'C Y X' are one picture. Raises `PipelineError` if the embeddings are neither
    PyTorch's nor those of the known defect.
    """
    with LlamaCpp(settings) as stock:
        found = stock.call("image_embeddings", square)
    features: Any = network.get_image_features(pixels[None]).pooler_output
    right = features[0].numpy()
    limit, error = max(EMBEDDINGS_LIMIT.values()), relative_error(found, right)
    if error <= limit:
        return settings, RIGHT.format(build=build_name())
    if relative_error(found, defective_embeddings(network, pixels[None])[0].numpy()) > limit:
        raise PipelineError(
            f"{settings.mmproj}: llama.cpp {build_name()} computes embeddings that are {error:.0%} off, and not by "
            "the known defect of the class token; the file or this build is wrong"
        )
    width: int = network.config.tower.hidden_size
    return replace(settings, class_token_width=width), WRONG.format(build=build_name(), error=error)


@torch.no_grad()
def defective_embeddings(network: MobileVLMForCausalLM, pixels: torch.Tensor) -> torch.Tensor:
    """Return 'I N D' of images 'I C Y X' as llama.cpp computes them since May 2025 (issue #25814).

    The class token stands behind the patches, so that each patch has its neighbour's position. Then the first row is
    dropped, as if it were the class token.
    """
    tower = network.model.vision_tower
    layers = tower.vision_tower.vision_model
    embeddings = layers.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    class_token = embeddings.class_embedding.expand(len(patches), 1, -1)
    hidden = layers.pre_layrnorm(
        torch.cat([patches, class_token], dim=1) + embeddings.position_embedding.weight
    )
    for layer in layers.encoder.layers[: tower.num_layers]:
        hidden = layer(hidden, None)
    return network.model.mm_projector(hidden[:, 1:])
