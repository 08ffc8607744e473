"""The rules that score vision tokens for pruning: the twig's own scores, a base layer's attention, chance."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.tap import QueryAndKey, query_to_vision, recording, text_to_vision_attention
from pipeline.positions import Slots, find_slots
from pipeline.twig.base import Base
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.session import Session
from pipeline.twig.evaluation.coverage import diverse_order, even_order
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

TWIG, RANDOM, FASTV, FASTV_DEEP = "twig", "random", "fastv", "fastv+T"
TWIG_ROWS, EVEN, DIVERSE, TWIG_DIVERSE = "twig rows", "even", "diverse", "twig+diverse"
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
    layer of which the twig's last one is a copy (depth K+T, layer K+T-1). `twig rows` adds up the attention of the
    twig's last layer from all text behind an image, not from the last prompt position alone; `even` and `diverse`
    cover the image (pipeline/twig/evaluation/coverage.py), `twig+diverse` in turns with the twig's choices. Raises
    `ConfigError` for any other name.
    """
    names = dict.fromkeys(" ".join(name.split()) for name in text.split(",") if name.strip())
    if not names:
        raise ConfigError("selectors: none asked for; name some, such as twig,fastv,random")
    return [_selector(name, geometry) for name in names]


def _selector(name: str, geometry: Geometry) -> Selector:
    depths = {FASTV: geometry.attach_layer, FASTV_DEEP: geometry.attach_layer + geometry.num_layers}
    if name == RANDOM:
        return Selector(RANDOM, random_scores)
    if name in BY_TWIG:
        return Selector(name, BY_TWIG[name], depends_on_twig=name != DIVERSE)
    if name == EVEN:
        return Selector(EVEN, lambda base, twig, prompts, keys: even_order(_slots(prompts).vision))
    if depths.get(name) == 0:
        raise ConfigError(f"selector {name!r}: no layer runs before the twig (K is 0); name another one")
    if name in depths:
        return _of_layer(f"{name} (layer {depths[name] - 1})", depths[name] - 1, geometry)
    if found := LAYER.fullmatch(name):
        return _of_layer(name, int(found[1]), geometry)
    raise ConfigError(f"selector {name!r} is unknown; known are {', '.join(KNOWN)}, and layer N")


def _of_layer(name: str, layer: int, geometry: Geometry) -> Selector:
    if layer >= geometry.num_base_layers:
        last = geometry.num_base_layers - 1
        raise ConfigError(f"selector {name!r}: the base's layers are 0 to {last}; name one of these")

    def score(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
        return layer_scores(base, prompts, layer)

    return Selector(name, score)


def twig_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return the scores by which the twig itself prunes."""
    return _read(base, twig, prompts)[1]


@torch.inference_mode()
def _read(base: Base, twig: Twig, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Run shallow layers and twig over prompts; return the outputs of layer K 'B P D', and the scores 'B J'."""
    session = _session(base, twig, prompts)
    states = session.read_prompts()
    return states, session.read_with_twig(states)[1]


def _session(base: Base, twig: Twig, prompts: Prompts) -> Session:
    place = twig.geometry
    return Session(base, twig, prompts, first=place.attach_layer, wipe=place.wipe_layer, room=1)


def twig_row_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return the attention of the twig's last layer, added up over all text positions behind an image."""
    session, last = _session(base, twig, prompts), len(twig.layers) - 1
    states = session.read_prompts()
    assert session.own is not None
    with recording({last}) as made:
        session.own.run(states, prompts.rows)
    return text_to_vision_attention(made.kept[last], _slots(prompts)).mean(dim=1).sum(dim=1)


def diverse_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return an order of tokens that are unlike each other, by their outputs of layer K."""
    states, _ = _read(base, twig, prompts)
    return diverse_order(states, _slots(prompts).vision)


def twig_and_diverse_scores(base: Base, twig: Twig, prompts: Prompts, keys: Sequence[str]) -> Tensor:
    """Return an order of the twig's choices, in turns with tokens that are unlike those before them."""
    states, scores = _read(base, twig, prompts)
    return diverse_order(states, _slots(prompts).vision, scores)


BY_TWIG: dict[str, Score] = {
    TWIG: twig_scores,
    TWIG_ROWS: twig_row_scores,
    DIVERSE: diverse_scores,
    TWIG_DIVERSE: twig_and_diverse_scores,
}
KNOWN = (TWIG, FASTV, FASTV_DEEP, RANDOM, EVEN, DIVERSE, TWIG_DIVERSE, TWIG_ROWS)


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
