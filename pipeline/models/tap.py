"""The tap: text-to-vision attention of chosen layers, with gradient, from whatever a family does before its softmax.

The decoder runs an attention function of ours, registered with transformers' `AttentionInterface`. It keeps query,
key and mask of the chosen layers, which come to it after every projection, norm and rotation of the family, and hands
all of them on to SDPA. The rows of softmax(q k^T) are computed when the forward is over: the text rows alone, of
which only the vision columns are kept.

So nothing is kept twice under gradient checkpointing: the backward pass runs the layers again, but no recording is
open then. And what the backward pass needs of the tap lies outside the checkpointed layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.errors import ConfigError
from pipeline.positions import Slots

TAPPED = "alignkd_tapped"  # the name of the attention function, for `set_attn_implementation`


@dataclass(frozen=True)
class QueryAndKey:
    """What a layer's softmax is made of: query 'B H S D/H', key 'B H|G S D/H', the model's own mask, the scaling.

    `mask` is bool or additive, 'B|1 1|H S S'. None means causal where `is_causal`, else that all see all.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    is_causal: bool

    def narrowed(self, rows: Tensor, columns: Tensor) -> QueryAndKey:
        """Return one row of each sample, and some of its columns: positions 'B' and 'B J', -1 where there is none."""
        at, of = rows.clamp(min=0)[:, None, None, None], columns.clamp(min=0)[:, None]
        (num_heads, width), num_groups = self.query.shape[1::2], self.key.shape[1]
        if self.mask is not None:
            mask = self.mask.expand(len(rows), -1, -1, -1)
            mask = mask.gather(2, at.expand(-1, mask.shape[1], -1, mask.shape[3]))
            mask = mask.gather(3, of[:, :, None].expand(-1, mask.shape[1], -1, -1))
        else:
            mask = of[:, :, None] <= at if self.is_causal else None
        query = self.query.gather(2, at.expand(-1, num_heads, -1, width))
        key = self.key.gather(2, of[..., None].expand(-1, num_groups, -1, width))
        return QueryAndKey(query, key, mask, self.scaling, is_causal=False)


@dataclass
class Recording:
    """One forward: what was kept of the chosen layers, each by its number among the layers that have attention.

    `hidden` 'B S D' is the input of the decoder layer that `keeping_hidden` names.
    """

    chosen: Collection[int]
    stop_at: int | None = None
    wants_hidden: bool = False
    num_seen: int = 0
    kept: dict[int, QueryAndKey] = field(default_factory=dict)
    hidden: Tensor | None = None

    def stop_if_done(self) -> None:
        """End the forward once all that was asked of it is kept, if it is to stop at all."""
        lacks_hidden = self.wants_hidden and self.hidden is None
        if self.stop_at is not None and self.num_seen > self.stop_at and not lacks_hidden:
            raise _LayerReached


class _LayerReached(Exception):  # noqa: N818 - it ends a forward, and is no error
    """The forward reached the layer that it was to stop at."""


_open: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(
    chosen: Collection[int], *, stop_at: int | None = None, wants_hidden: bool = False
) -> Iterator[Recording]:
    """Yield what a forward in the context fills. The decoder must run the attention function `TAPPED`.

    With `stop_at` the forward ends in that layer, before its softmax, or where it keeps `hidden`, if that comes
    later: nothing after it runs, so that its weights need not be loaded. -1 stops for `hidden` alone. The statement
    in the context is then left without a result.
    """
    made = Recording(chosen, stop_at, wants_hidden)
    token = _open.set(made)
    try:
        yield made
    except _LayerReached:
        pass
    finally:
        _open.reset(token)


@contextmanager
def keeping_hidden(decoder: Any, layer: int) -> Iterator[None]:
    """Let the open recording keep the input of a layer of the decoder; of layer L the input of the final norm.

    The input of a layer, not the output of the one before: some families add to that (Qwen3-VL's deepstack).
    """

    def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if (made := _open.get()) is not None:
            made.hidden = args[0] if args else named["hidden_states"]
            made.stop_if_done()

    module = decoder.layers[layer] if layer < len(decoder.layers) else final_norm(decoder)
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def final_norm(decoder: Any) -> nn.Module:
    """Return the norm that follows the decoder's last layer. Raises `ConfigError` unless there is exactly one."""
    found = [module for name, module in decoder.named_children() if name.endswith("norm")]
    if len(found) != 1:
        raise ConfigError(
            f"{type(decoder).__name__} has {len(found)} norms beside its layers, so that what its last layer gives "
            "cannot be read; ask for the input of a layer"
        )
    return found[0]


def _tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Keep what the open recording asks for, and return SDPA's result; transformers' signature."""
    if (made := _open.get()) is not None:
        if kwargs.get("softcap") is not None:  # SDPA ignores it, so the model would compute something else
            raise ConfigError("attention with a soft cap cannot be computed by SDPA; use a model without one")
        layer, made.num_seen = made.num_seen, made.num_seen + 1
        if layer in made.chosen:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            is_causal = kwargs.get("is_causal")
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            made.kept[layer] = QueryAndKey(query, key, attention_mask, scale, is_causal)
        made.stop_if_done()
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register(TAPPED, _tapped_attention)
AttentionMaskInterface.register(TAPPED, sdpa_mask)


def attention_of_layers(kept: Mapping[int, QueryAndKey], slots: Slots) -> dict[int, Tensor]:
    """Return the text-to-vision attention of every recorded layer: layer -> float32 'B H T J'.

    Of several layers with gradient, each layer's rows are computed again in the backward pass: the rows of one layer
    are in memory at a time.
    """
    is_costly = len(kept) > 1 and torch.is_grad_enabled()
    return {
        layer: checkpoint(text_to_vision_attention, one, slots, use_reentrant=False)
        if is_costly
        else text_to_vision_attention(one, slots)
        for layer, one in kept.items()
    }


def text_to_vision_attention(kept: QueryAndKey, slots: Slots) -> Tensor:
    """Return the attention of a layer's text rows to the vision columns: float32 'B H T J'.

    Each row is a softmax over all keys that the model lets it see. Only the vision columns are returned, so a row
    sums to the share of attention that falls on images. Padding rows and columns (-1 in `slots`) are zero.
    """
    rows = slots.text.clamp(min=0)  # a padding row reads position 0, and is zeroed at the end
    query = kept.query.gather(
        2, rows[:, None, :, None].expand(-1, kept.query.shape[1], -1, kept.query.shape[3])
    )
    key = kept.key.repeat_interleave(kept.query.shape[1] // kept.key.shape[1], dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * kept.scaling
    scores = _masked(scores, kept, rows)
    # float32 as in eager attention: half precision is too coarse for the small shares of a long row.
    probabilities = scores.softmax(dim=-1, dtype=torch.float32)
    columns = slots.vision.clamp(min=0)[:, None, None].expand(*probabilities.shape[:3], -1)
    real = (slots.text >= 0)[:, None, :, None] & (slots.vision >= 0)[:, None, None, :]
    return probabilities.gather(3, columns) * real


def _masked(scores: Tensor, kept: QueryAndKey, rows: Tensor) -> Tensor:
    """Return the scores 'B H T S' of text rows under the model's mask."""
    # Not -inf: where a padding row sees nothing, softmax would give NaN, and NaN times zero is NaN.
    smallest = torch.finfo(scores.dtype).min
    if kept.mask is None:
        if not kept.is_causal:
            return scores
        visible = torch.arange(scores.shape[3], device=rows.device) <= rows[:, :, None]
        return scores.masked_fill(~visible[:, None], smallest)
    mask = kept.mask.expand(len(rows), -1, -1, -1)
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return scores.masked_fill(~mask, smallest) if mask.dtype == torch.bool else scores + mask


def query_to_vision(kept: QueryAndKey, rows: Tensor, vision: Tensor, *, whole_row: bool) -> Tensor:
    """Return the attention of one position of each sample to the vision columns: float32 'B H J'.

    `rows` 'B' are the positions, `vision` 'B J' the columns, both -1 where there is none. With `whole_row` the
    softmax is over all keys that the model lets the position see; without, over the vision columns alone, so that
    each head sums to 1. Columns that the position cannot see, padding, and samples without a position are zero.
    """
    num_groups, num_heads = kept.key.shape[1], kept.query.shape[1]
    at = rows.clamp(min=0)[:, None]
    query = kept.query.gather(2, at[:, None, :, None].expand(-1, num_heads, -1, kept.query.shape[3]))
    # Heads that share a key are rows of one product: the keys are not repeated for each head.
    scores = torch.matmul(query.unflatten(1, (num_groups, -1)).squeeze(3), kept.key.transpose(2, 3))
    scores = _masked(scores.flatten(1, 2)[:, :, None] * kept.scaling, kept, at)[:, :, 0]
    columns = vision.clamp(min=0)[:, None].expand(-1, num_heads, -1)
    seen = scores.gather(2, columns) > torch.finfo(scores.dtype).min / 2
    seen = seen & (vision >= 0)[:, None] & (rows >= 0)[:, None, None]
    if whole_row:
        return scores.softmax(dim=-1, dtype=torch.float32).gather(2, columns) * seen
    scores = scores.gather(2, columns).masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32) * seen
