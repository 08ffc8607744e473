"""Small bases, twigs and prompts, and an oracle that decodes without a cache, without the code under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from torch import Tensor

from pipeline.config.config import DataConfig
from pipeline.conformance.specimen import Specimen, made_up_samples
from pipeline.data.conversation import TokenizedSample
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import pad_tokens
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import IGNORE_INDEX
from pipeline.twig.base import Base
from pipeline.twig.decoding.choosing import Warp
from pipeline.twig.decoding.generate import Answers
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.session import Session
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

# lfm2_vl has layers without attention, which a twig refuses.
FAMILIES = tuple(family for family in tiny_families.FAMILIES if family != "lfm2_vl")


@dataclass(frozen=True)
class TwigSpecimen:
    """A base with made-up prompts: `prompts()` of chosen samples, padded on the left."""

    folder: Path
    specimen: Specimen
    base: Base

    @property
    def num_prompts(self) -> int:
        return len(self.specimen.samples)

    @property
    def stop_ids(self) -> frozenset[int]:
        """An image token cannot be read as text, so an answer ends with it."""
        return frozenset([self.specimen.vlm.image_token_id])

    def prompts(self, chosen: Sequence[int]) -> Prompts:
        """Return the samples up to their last answer."""
        samples = [prompt_of(self.specimen.samples[n]) for n in chosen]
        vlm = self.specimen.vlm
        batch = pad_tokens(samples, vlm.image_token_id, on_the_left=True)
        sizes = [size for sample in samples for size in sample.sizes]
        pixels = [image for n, sample in zip(chosen, samples, strict=True)
                  for image in self.specimen.images[n][: len(sample.sizes)]]  # fmt: skip
        features = vlm.encode(pixels, sizes) if sizes else None
        return Prompts.of(vlm.inputs(batch, features), image_token_id=vlm.image_token_id)

    def twig(self, geometry: Geometry, *, seed: int | None = None, prunes: bool = False) -> Twig:
        """Return a twig: copied layers, or with a seed random ones; with a random pruning head if it `prunes`."""
        made = Twig.copied(self.base.network, geometry, prunes=prunes).eval()
        if seed is not None:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                for parameter in made.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return made


def prompt_of(sample: TokenizedSample) -> TokenizedSample:
    """Return a sample up to its last answer, which all of its images precede."""
    end = len(sample.labels)
    while sample.labels[end - 1] == IGNORE_INDEX:  # what follows the answer
        end -= 1
    while sample.labels[end - 1] != IGNORE_INDEX:
        end -= 1
    return TokenizedSample(sample.input_ids[:end], (IGNORE_INDEX,) * end, sample.sizes)


def twig_specimen(family: str, folder: Path, *, num_layers: int = 6, seed: int = 0) -> TwigSpecimen:
    """Write a tiny checkpoint of a family, load it in float32, and make prompts up."""
    tiny_families.write_checkpoint(family, folder, seed=seed, num_hidden_layers=num_layers)
    network = load_network(str(folder), dtype=torch.float32).eval()
    template = "v1" if family == "mobilevlm" else "chat"
    preparation = load_preparation(str(folder), DataConfig(shards="", template=template))
    samples, images, refused = made_up_samples(preparation)
    specimen = Specimen(VisionLanguageModel(network), samples, images, tuple(refused))
    return TwigSpecimen(folder, specimen, Base.of(network))


@contextmanager
def _visible_columns(base: Base, visible: dict[int, Tensor]) -> Iterator[None]:
    """Let the rows of each layer see only some columns, bool 'P' by layer: nobody sees a dropped token."""

    def narrow(number: int):
        def hook(module: Any, args: Any, kwargs: dict[str, Any]):
            length = args[0].shape[1]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            columns = torch.ones(length, dtype=torch.bool)
            columns[: len(visible[number])] = visible[number]
            return args, {**kwargs, "attention_mask": mask & columns}

        return hook

    handles = [
        layer.register_forward_pre_hook(narrow(n), with_kwargs=True)
        for n, layer in enumerate(base.layers)
        if n in visible
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle_logits(
    base: Base, prompts: Prompts, tokens: Sequence[int], kept: Tensor | None, geometry: Geometry
) -> Tensor:
    """Return the logits 'S V' of one prompt without padding and the tokens after it, by the family's own forward.

    `kept` bool 'P' are the vision tokens that stay after layer K; None: no pruning.
    """
    inputs = prompts.extended(len(tokens), base.network.config.model_type)
    if tokens:
        inputs["input_ids"][:, prompts.length :] = torch.tensor([tokens])
    visible: dict[int, Tensor] = {}
    if kept is not None:
        is_text = ~prompts.is_vision[0]
        is_text[-1] = True
        for number in range(geometry.attach_layer, geometry.num_base_layers):
            visible[number] = (is_text | kept) if number < geometry.wipe_layer else is_text
    with _visible_columns(base, visible):
        return base.network(**inputs, use_cache=False).logits[0]


def oracle(
    base: Base,
    prompts: Prompts,
    kept: Tensor | None,
    geometry: Geometry,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Return the greedy answer to one prompt, with everything computed again for every token."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        tokens.append(int(oracle_logits(base, prompts, tokens, kept, geometry)[-1].argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens


@torch.inference_mode()
def kept_by(specimen: TwigSpecimen, twig: Twig, prompts: Prompts, keep: float) -> Tensor | None:
    """Return the vision tokens of one prompt that a twig keeps, bool 'P'; None where there are none."""
    places = prompts.is_vision[0].nonzero()[:, 0]
    if not len(places):
        return None
    geometry = twig.geometry
    session = Session(
        specimen.base, twig, prompts, first=geometry.attach_layer, wipe=geometry.wipe_layer, room=1
    )
    _, scores = session.read_with_twig(session.read_prompts())
    kept = torch.zeros(prompts.length, dtype=torch.bool)
    kept[places[scores[0].topk(geometry.num_kept(len(places), keep)).indices]] = True
    return kept


def made_once(make_folder: Callable[[str], Path]) -> Callable[[str], TwigSpecimen]:
    """Return a function that makes the specimen of a family at its first call; `make_folder` gives it a place."""
    return cache(lambda family: twig_specimen(family, make_folder(family)))


def assert_pairs_follow_the_base(
    base: Base, prompts: Prompts, geometry: Geometry, warp: Warp, draw: Callable[[], Answers], *, draws: int
) -> None:
    """Compare the first two tokens of drawn answers with the base's own probabilities under `warp` (chi-square).

    `warp` leaves three tokens at each place.
    """
    first = warp(oracle_logits(base, prompts, [], None, geometry)[-1]).softmax(-1)
    pairs: dict[tuple[int, int], float] = {}
    for one in first.nonzero()[:, 0].tolist():
        second = warp(oracle_logits(base, prompts, [one], None, geometry)[-1]).softmax(-1)
        for other in second.nonzero()[:, 0].tolist():
            pairs[one, other] = float(first[one] * second[other])
    assert len(pairs) == 9 and sum(pairs.values()) == pytest.approx(1, abs=1e-5)
    counts = dict.fromkeys(pairs, 0)
    accepted = 0
    for _ in range(draws):
        made = draw()
        counts[made.tokens[0][0], made.tokens[0][1]] += 1  # a pair that the base cannot write is a KeyError
        accepted += made.accepted[0]
    assert accepted > 0.1 * draws
    statistic = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in pairs.items())
    assert statistic < 26.1  # chi-square with 8 degrees of freedom: 0.1% are larger
