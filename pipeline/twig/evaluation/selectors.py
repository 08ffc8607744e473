"""The rules that score vision tokens for pruning: the twig's own scores, a base layer's attention, chance."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.tap import QueryAndKey, query_to_vision, recording
from pipeline.positions import Slots, find_slots
from pipeline.twig.base import Base
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.session import Session
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

TWIG, RANDOM, FASTV, FASTV_DEEP = "twig", "random", "fastv", "fastv+T"
LAYER = re.compile(r"layer (\d+)")

# Base, twig, prompts and the keys of their samples -> scores float32 'B J' of the vision tokens.
Score = Callable[[Base, Twig, Prompts, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Selector:
    """A named rule. `depends_on_twig` says whether another twig of the same geometry scores otherwise."""

    name: str
    score: Score
    depends_on_twig: bool = False


def parse_selectors(text: str, geometry: Geometry) -> list[Selector]:
    """Return the selectors of a list such as `twig,fastv,fastv+T,random,layer 11`; layers count from 0.

    `fastv` is the attention of the last layer that runs before pruning (depth K, layer K-1), `fastv+T` that of the
    layer of which the twig's last one is a copy (depth K+T, layer K+T-1). Raises `ConfigError` for any other name.
    """
    names = dict.fromkeys(" ".join(name.split()) for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError("selectors: none asked for; name some, such as twig,fastv,random")
    return [_selector(name, geometry) for name in names]


def _selector(name: str, geometry: Geometry) -> Selector:
    depths = {FASTV: geometry.attach_layer, FASTV_DEEP: geometry.attach_layer + geometry.num_layers}
    if name == TWIG:
        return Selector(TWIG, twig_scores, depends_on_twig=True)
    if name == RANDOM:
        return Selector(RANDOM, random_scores)
    if depths.get(name) == 0:
        raise ConfigError(f"selector {name!r}: no layer runs before the twig (K is 0); name another one")
    if name in depths:
        return _of_layer(f"{name} (layer {depths[name] - 1})", depths[name] - 1, geometry)
    if found := LAYER.fullmatch(name):
        return _of_layer(name, int(found[1]), geometry)
    raise ConfigError(
        f"selector {name!r} is unknown; known are {TWIG}, {FASTV}, {FASTV_DEEP}, {RANDOM}, and layer N"
    )


def _of_layer(name: str, layer: int, geometry: Geometry) -> Selector:
    if layer >= geometry.num_base_layers:
        last = geometry.num_base_layers - 1
        raise ConfigError(f"selector {name!r}: the base's layers are 0 to {last}; name one of these")

    def score(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
        return layer_scores(base, prompts, layer)

    return Selector(name, score)


def twig_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return the scores by which the twig itself prunes."""
    place = twig.geometry
    session = Session(base, twig, prompts, first=place.attach_layer, wipe=place.wipe_layer, room=1)
    return session.read_with_twig(session.read_prompts())[1]


def layer_scores(base: Base, prompts: Prompts, layer: int) -> Tensor:
    """Return the attention of a base layer from the last prompt position: over the whole row, mean over heads.

    The base runs up to that layer.
    """
    return _from_the_end(_recorded(base, prompts, {layer})[layer], _slots(prompts)).mean(dim=1)


def random_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return random scores that depend on a sample's key alone, and not on its batch."""
    vision = _slots(prompts).vision
    scores = torch.zeros(vision.shape)
    for row, key, count in zip(scores, keys, (vision >= 0).sum(dim=1).tolist(), strict=True):
        seed = int.from_bytes(blake3(key.encode()).digest(length=7), "big")
        row[:count] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return scores.to(vision.device)


def looks(base: Base, prompts: Prompts) -> Tensor:
    """Return the share of each layer's attention from the last prompt position that falls on images: 'B L'."""
    kept, slots = _recorded(base, prompts, range(len(base.layers))), _slots(prompts)
    shares = [_from_the_end(kept[layer], slots).mean(dim=1).sum(dim=1) for layer in range(len(base.layers))]
    return torch.stack(shares, dim=1)


@torch.inference_mode()
def _recorded(base: Base, prompts: Prompts, layers: Collection[int]) -> dict[int, QueryAndKey]:
    with recording(layers, stop_at=max(layers)) as made:
        base.network(**prompts.inputs, use_cache=False)
    return made.kept


def _slots(prompts: Prompts) -> Slots:
    return find_slots(prompts.is_vision, prompts.inputs["attention_mask"])


def _from_the_end(kept: QueryAndKey, slots: Slots) -> Tensor:
    """Return the attention of the last position to the vision tokens, 'B H J'."""
    last = torch.full((len(kept.query),), kept.query.shape[2] - 1, device=kept.query.device)
    return query_to_vision(kept, last, slots.vision, whole_row=True)
