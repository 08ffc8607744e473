"""How the models of families take the pixel inputs of several images: tensors of one name -> one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def one_after_another(tensors: Sequence[Tensor]) -> Tensor:
    """Join along the first axis: images, tiles or patches."""
    return torch.cat(list(tensors))


def in_one_row(tensors: Sequence[Tensor]) -> Tensor:
    """Join tiles along the second axis, '1 tiles ...'. The processor's own rows, one a text, are padded with zeros.

    The model drops these zeros and numbers the tiles through, so that one row serves any number of texts.
    """
    return torch.cat(list(tensors), dim=1)


def padded_tiles(tensors: Sequence[Tensor]) -> Tensor:
    """Join along the first axis, images, after zeros for the tiles (second axis) that an image has too few."""
    if tensors[0].ndim != 5:  # image_sizes
        return one_after_another(tensors)
    most = max(tensor.shape[1] for tensor in tensors)
    padded = [torch.cat([t, t.new_zeros(1, most - t.shape[1], *t.shape[2:])], dim=1) for t in tensors]
    return one_after_another(padded)
