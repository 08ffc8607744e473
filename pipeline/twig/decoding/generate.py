"""Generation with a twig: pruned prefill, drafts, verification, and the text that the base itself would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.twig.base import Base
from pipeline.twig.decoding.choosing import Choice, Greedy, Verdict
from pipeline.twig.decoding.drafter import Drafter, Drafts
from pipeline.twig.decoding.drafting import DraftRules, SequenceDrafter, SequenceDrafts
from pipeline.twig.decoding.faster import FasterDrafter, TreeIfFaster
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.session import Session
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.decoding.tree_drafting import TreeDrafter
from pipeline.twig.module import Twig


@dataclass(frozen=True)
class Decoding:
    """How to answer.

    `keep`       share of vision tokens kept on average over the layers (1/9: 88.9% pruned); None: no pruning
    `delta`      most drafts of an iteration; 0: none; `auto`: one more after an iteration that accepted all
    `threshold`  probability below which drafting stops (theta)
    `look_up`    tokens that must occur again for n-gram drafts where the twig is unsure; 0: none
    `tree`       the shape of trees that are drafted; `delta` and `threshold` have no part in them; None: no trees;
                 TreeIfFaster: trees or sequences, what is measured to be faster
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    keep: float | None = None
    delta: int | Literal["auto"] = 5
    threshold: float = 0.6
    look_up: int = 0
    choice: Choice = field(default_factory=Greedy)
    tree: Tree | TreeIfFaster | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("delta", 0), ("look_up", 0)):
            value = getattr(self, name)
            is_number = isinstance(value, int) and value >= least
            if not is_number and (name, value) != ("delta", "auto"):
                other = "auto, or " if name == "delta" else ""
                raise ConfigError(f"{name}: expected {other}a number from {least} on, found {value!r}")
        if not isinstance(self.threshold, int | float):
            raise ConfigError(f"threshold: expected a probability, found {self.threshold!r}")
        if self.keep is not None and not (isinstance(self.keep, int | float) and 0 < self.keep <= 1):
            raise ConfigError(f"keep: expected a share above 0 and at most 1, or null, found {self.keep!r}")
        if self.tree is not None and not isinstance(self.tree, Tree | TreeIfFaster):
            raise ConfigError(f"tree: expected a Tree(...), a TreeIfFaster(...) or null, found {self.tree!r}")
        if isinstance(self.tree, TreeIfFaster) and self.delta == 0:
            raise ConfigError(
                "delta: 0 asked for with a TreeIfFaster, which drafts sequences, too; set delta"
            )
        if self.tree is not None and self.look_up:
            raise ConfigError(
                f"look_up: {self.look_up} asked for with a tree, which cannot hold its drafts; choose one"
            )

    @property
    def has_drafts(self) -> bool:
        return self.tree is not None or self.delta != 0


@dataclass
class Answers:
    """What was generated: `tokens` of each sample, the stop token included, and how it was done.

    `drafted` and `accepted` count drafts of each sample, `passes` verifications of each; the first one includes the
    prompts. `rows` are the positions that each group of layers, times its layers, and each head computed.
    """

    tokens: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    passes: list[int]
    rows: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def begun(cls, num_samples: int) -> Answers:
        return cls([[] for _ in range(num_samples)], [0] * num_samples, [0] * num_samples, [0] * num_samples)


@torch.inference_mode()
def answer(
    base: Base, twig: Twig | None, prompts: Prompts, decoding: Decoding, *, scores: Tensor | None = None
) -> Answers:
    """Answer a batch. The tokens are those that the base, pruned alike, would write one by one.

    Without a twig nothing is drafted. `scores` float32 'B J' of the vision tokens take the place of the twig's.
    Raises `ConfigError` for a share that cannot be kept.
    """
    return _Loop(base, twig, prompts, decoding, scores).run()


class _Loop:
    """The iterations: draft, verify, confirm."""

    def __init__(
        self, base: Base, twig: Twig | None, prompts: Prompts, decoding: Decoding, scores: Tensor | None
    ):
        if twig is None and (decoding.keep is not None or decoding.has_drafts):
            raise ConfigError("decoding without a twig: set keep and tree to null, and delta to 0")
        if twig is not None:
            _check_fits(base, twig)
        geometry = None if twig is None else twig.geometry
        first, wipe = (
            (0, len(base.layers)) if geometry is None else (geometry.attach_layer, geometry.wipe_layer)
        )
        self.session = Session(base, twig, prompts, first=first, wipe=wipe, room=decoding.max_new_tokens)
        self.prompts, self.decoding, self.scores = prompts, decoding, scores
        self.answers = Answers.begun(len(prompts.is_vision))
        self.active = [True] * len(self.answers.tokens)
        self.drafter = self._drafter()

    def _drafter(self) -> Drafter[Any] | None:
        tree = self.decoding.tree
        if self.session.twig is None or not self.decoding.has_drafts:
            return None
        if isinstance(tree, Tree):
            return self._of_trees(tree)
        sequence = self._of_sequences()
        return sequence if tree is None else FasterDrafter(sequence, self._of_trees(tree.tree), tree)

    def _of_trees(self, tree: Tree) -> TreeDrafter:
        return TreeDrafter(self.session, self.decoding.choice, tree, self.decoding.stop_ids)

    def _of_sequences(self) -> SequenceDrafter:
        how = self.decoding
        rules = DraftRules(how.delta, how.threshold, how.stop_ids, how.look_up)
        return SequenceDrafter(self.session, how.choice, rules)

    def run(self) -> Answers:
        self._begin()
        while True:
            drafts = self._draft()
            verdict = self.decoding.choice.judge(
                self.session.verify(drafts.states, drafts.rows, drafts.visible)
            )
            accepted = [self._take(b, drafts, verdict) for b in range(len(self.active))]
            if not any(self.active):
                self.answers.rows = self.session.num_rows()
                return self.answers
            self._confirm(drafts, accepted)

    def _begin(self) -> None:
        states = self.session.read_prompts()
        has_images = bool(self.prompts.is_vision.any())
        needs_scores = self.decoding.keep is not None and has_images and self.scores is None
        scores = self.scores
        if self.drafter is not None or needs_scores:
            output, own = self.session.read_with_twig(states)
            scores = own if scores is None else scores
            if self.drafter is not None:
                self.drafter.output = output
        if self.decoding.keep is not None and has_images:
            assert scores is not None
            self.session.prune(scores, self._counts(self.decoding.keep))

    def _counts(self, keep: float) -> list[int]:
        """Return R, the vision tokens that stay, of each sample."""
        assert self.session.twig is not None
        geometry = self.session.twig.geometry
        return [geometry.num_kept(m, keep) if m else 0 for m in self.prompts.is_vision.sum(dim=1).tolist()]

    def _draft(self) -> Drafts:
        lengths = [len(tokens) for tokens in self.answers.tokens]
        most = self.decoding.max_new_tokens
        limits = [most - length - 1 if on else 0 for length, on in zip(lengths, self.active, strict=True)]
        if self.drafter is None or not any(limits):
            return SequenceDrafts([[] for _ in limits])
        starts = [self.prompts.length + length for length in lengths]
        texts = [
            [*prompt, *tokens] if self.decoding.look_up else tokens
            for prompt, tokens in zip(self.prompt_ids, self.answers.tokens, strict=True)
        ]
        return self.drafter.draft(texts, starts, limits)

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """The prompts' ids for looking up, -1 for vision tokens; nothing where nothing is looked up."""
        if not self.decoding.look_up:
            return [[] for _ in self.active]
        return self.prompts.inputs["input_ids"].masked_fill(self.prompts.is_vision, -1).tolist()

    def _take(self, b: int, drafts: Drafts, verdict: Verdict) -> list[int]:
        """Add what a sample gets of an iteration: the accepted drafts, and the base's own token behind them.

        Return the columns of the accepted drafts. A sample ends at a stop token, or when it is long enough.
        """
        if not self.active[b]:
            return []
        columns, new = drafts.walk(b, verdict)
        self.answers.passes[b] += 1
        self.answers.drafted[b] += drafts.count(b)
        self.answers.accepted[b] += len(columns)
        self._append(b, new)
        return columns

    def _append(self, b: int, new: Sequence[int]) -> None:
        tokens = self.answers.tokens[b]
        for token in new:
            tokens.append(token)
            if token in self.decoding.stop_ids or len(tokens) >= self.decoding.max_new_tokens:
                self.active[b] = False
                return

    def _confirm(self, drafts: Drafts, columns: Sequence[Sequence[int]]) -> None:
        """Cut the caches back to what is confirmed, and read the newest token."""
        device = self.prompts.is_vision.device
        if drafts.num_columns:
            assert self.drafter is not None
            self.drafter.confirm(drafts, columns)
        newest = [tokens[-1] for tokens in self.answers.tokens]
        rows = [
            self.prompts.length + len(tokens) - 1 if on else -1
            for tokens, on in zip(self.answers.tokens, self.active, strict=True)
        ]
        ids, at = (torch.tensor(values, device=device)[:, None] for values in (newest, rows))
        states = self.session.read_tokens(ids, at)
        self.session.pending = states, at
        if self.drafter is not None:
            self.drafter.confirmed(states, at)


def _check_fits(base: Base, twig: Twig) -> None:
    """Raise `ConfigError` for a twig of a longer or shorter base, or with another dtype or place than this one."""
    asked, found = twig.geometry.num_base_layers, len(base.layers)
    if asked != found:
        raise ConfigError(
            f"the twig belongs to a base of {asked} layers, this model has {found}; use its own base"
        )
    mine, theirs = next(twig.parameters()), base.network
    if (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
        raise ConfigError(
            f"the twig is {mine.dtype} on {mine.device}, its base {theirs.dtype} on {theirs.device}; load the twig "
            "again with `load_twig`, after the base has moved"
        )


def answers_as_tensor(answers: Answers, *, pad_id: int) -> Tensor:
    """Return the new tokens as int64 'B S', padded on the right."""
    width = max(map(len, answers.tokens))
    return torch.tensor([[*tokens, *[pad_id] * (width - len(tokens))] for tokens in answers.tokens])
