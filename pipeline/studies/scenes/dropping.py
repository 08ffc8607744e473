"""A language model's forward in which positions are dropped on the way: pruned vision tokens, and FinalWipe.

The layers are called by hand, since hidden states, positions and mask become shorter at a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.studies.scenes.scenes import GRID
from pipeline.studies.shared_prefix import PackedQuestions


def run_layers(
    model: MobileVLMForCausalLM, batch: PackedQuestions, vision_tokens: Tensor, keep: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return hidden states 'B T D' after the final norm, and their places among all positions, int64 'B T'.

    `keep` gives, for a layer, the positions that this layer and the later ones have: bool 'B S', equally many a row.
    """
    body = model.model
    hidden = model.embed(batch.ids, vision_tokens)
    mask = torch.zeros(batch.seen.shape).masked_fill(~batch.seen, torch.finfo(hidden.dtype).min)
    rotary = body.rotary_emb(hidden, position_ids=batch.position)
    left = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    for number, layer in enumerate(body.layers):
        if number in keep:
            chosen = _places_of(keep[number].gather(1, left))
            hidden, *rotary = (_take(part, chosen) for part in (hidden, *rotary))
            mask = _take(_take(mask, chosen).transpose(1, 2), chosen).transpose(1, 2)
            left = left.gather(1, chosen)
        hidden = layer(hidden, attention_mask=mask[:, None], position_embeddings=tuple(rotary))
    return body.norm(hidden), left


def _places_of(kept: Tensor) -> Tensor:
    """Return where rows of bool 'B S' are true, int64 'B T'."""
    return kept.nonzero()[:, 1].view(len(kept), -1)


def _take(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen ones of the rows: 'B S D' -> 'B T D'."""
    return rows.gather(1, chosen[:, :, None].expand(-1, -1, rows.shape[2]))


def without_vision(ids: Tensor) -> Tensor:
    """Return which positions FinalWipe keeps, bool 'B S': all but the vision tokens."""
    return ids != IMAGE_TOKEN_ID


def with_some_vision(ids: Tensor, kept: Tensor) -> Tensor:
    """Return which positions are kept, bool 'B S': all but the vision tokens that `kept`, bool 'B N', leaves out."""
    return without_vision(ids).masked_scatter(ids == IMAGE_TOKEN_ID, kept)


def random_subsets(number: int, generator: torch.Generator, *, side: int, fewest: int, most: int) -> Tensor:
    """Draw vision tokens of a `side` x `side` grid to keep, bool 'B N', of one log-uniform size for all rows.

    Some batches keep tokens that cluster in cells, as a selector that looks at an asked cell does.
    """
    share, clustering = torch.rand(2, generator=generator).tolist()
    size = round(fewest * (most / fewest) ** share)
    scores = torch.randn(number, side * side, generator=generator)
    scores += 2 * clustering * torch.randn(number, GRID**2, generator=generator)[:, cells_of_tokens(side)]
    kept = scores.topk(size, dim=1).indices
    return torch.zeros(number, side * side, dtype=torch.bool).scatter(1, kept, True)


def cells_of_tokens(side: int) -> Tensor:
    """Return the cell of the scene, 0 to 8, in which each vision token of a `side` x `side` grid lies, int64 'N'."""
    third = torch.arange(side) * GRID // side
    return (third[:, None] * GRID + third).flatten()
