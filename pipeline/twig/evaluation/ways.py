"""The ways to answer that are timed: without a twig, with drafts, with pruning, with both, and transformers' own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.errors import ConfigError
from pipeline.evaluation.questions import Question
from pipeline.models.vlm import ImageFeatures
from pipeline.twig.decoding.faster import TreeIfFaster
from pipeline.twig.decoding.generate import Answers, Decoding, answer
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.evaluation.asking import Asker
from pipeline.twig.evaluation.operations import Operations
from pipeline.twig.module import Twig

NO_TWIG, WITH_TWIG, GENERATE = "no twig", "twig", "generate of transformers"
EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "auto": lambda: {"delta": "auto"},
    "look_up": lambda: {"look_up": 2},
    "tree": lambda: {"tree": Tree()},
    "tree_if_faster": lambda: {"tree": TreeIfFaster()},
}


@dataclass(frozen=True)
class Prepared:
    """A question whose image features are computed already: the vision tower is not timed."""

    question: Question
    prompts: Prompts
    features: ImageFeatures | None

    @classmethod
    def of(cls, asker: Asker, question: Question) -> Prepared:
        features = asker.batches.features([question])
        inputs = asker.batches.vlm.inputs(asker.batches.padded([question]), features)
        return cls(question, Prompts.of(inputs, image_token_id=asker.preparation.image_token_id), features)


@dataclass
class Timed:
    """One answer: its tokens, its time in seconds, drafts, verifications, and multiply-adds (None: not counted)."""

    tokens: list[int]
    seconds: float
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    operations: float | None = None


@dataclass(frozen=True)
class Way:
    """A named way to answer; `like` names the way that writes the same text without the twig's drafts."""

    name: str
    run: Callable[[Prepared, Twig], Timed]
    like: str = ""


def kept_way(share: str) -> str:
    """Return the name of the way that keeps a share of the vision tokens, such as 1/9, and drafts nothing."""
    return f"{share} kept"


def check_extras(extras: Sequence[str]) -> None:
    """Raise `ConfigError` for an unknown extra way."""
    if unknown := [name for name in extras if name not in EXTRAS]:
        raise ConfigError(f"ways: unknown {', '.join(map(repr, unknown))}; known are {', '.join(EXTRAS)}")


def ways_of(asker: Asker, shares: Sequence[Fraction], extras: Sequence[str]) -> list[Way]:
    """Return the ways, the one without a twig first."""
    plain = Decoding(asker.max_new_tokens, asker.stop_ids)
    ways = [Way(NO_TWIG, _ours(asker, replace(plain, delta=0), has_twig=False))]
    ways += [Way(WITH_TWIG, _ours(asker, plain), NO_TWIG)]
    for share in shares:
        pruned = replace(plain, keep=float(share))
        name = kept_way(str(share))
        ways += [
            Way(name, _ours(asker, replace(pruned, delta=0))),
            Way(f"{WITH_TWIG}, {name}", _ours(asker, pruned), name),
        ]
    for extra in extras:
        changed = replace(plain, **EXTRAS[extra]())
        ways.append(Way(f"{WITH_TWIG}, {extra}", _ours(asker, changed), NO_TWIG))
    return [*ways, Way(GENERATE, _of_transformers(asker), NO_TWIG)]


def _ours(asker: Asker, decoding: Decoding, *, has_twig: bool = True) -> Callable[[Prepared, Twig], Timed]:
    def run(one: Prepared, twig: Twig) -> Timed:
        used = twig if has_twig else None
        begun = time.perf_counter()
        made: Answers = answer(asker.base, used, one.prompts, decoding)
        seconds = time.perf_counter() - begun
        counts = (made.drafted[0], made.accepted[0], made.passes[0])
        return Timed(made.tokens[0], seconds, *counts, Operations.of(asker.base, used).of_answers(made))

    return run


def _of_transformers(asker: Asker) -> Callable[[Prepared, Twig], Timed]:
    preparation = asker.preparation
    settings = GenerationConfig(
        max_new_tokens=asker.max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=preparation.pad_id,
        eos_token_id=preparation.stop_ids,
    )
    # Replaces the checkpoint's own, from which transformers takes whatever a call does not name.
    asker.batches.vlm.network.generation_config = settings

    def run(one: Prepared, twig: Twig) -> Timed:
        batch = asker.batches.padded([one.question])
        begun = time.perf_counter()
        made = asker.batches.vlm.generate(batch, one.features, generation_config=settings)
        if made.is_cuda:
            torch.cuda.synchronize()
        return Timed(made[0].tolist(), time.perf_counter() - begun)

    return run
