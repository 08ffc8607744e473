"""What llama.cpp computes of a CLIP tower while it puts the class token last (issue #25814), in PyTorch."""

from __future__ import annotations

import torch

from pipeline.models.mobilevlm import MobileVLMForCausalLM


@torch.no_grad()
def defective_embeddings(network: MobileVLMForCausalLM, pixels: torch.Tensor) -> torch.Tensor:
    """Return 'I N D' of images 'I C Y X' with the defect.

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
