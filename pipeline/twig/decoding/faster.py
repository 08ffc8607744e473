"""Trees of drafts where they pay, else sequences: what is faster is measured while answering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.twig.decoding.drafter import Drafter, Drafts
from pipeline.twig.decoding.drafting import SequenceDrafter
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.decoding.tree_drafting import TreeDrafter

Way = Literal["sequence", "tree"]
TRIED = 4  # iterations of each way before one is chosen; the first warms up and is not counted


@dataclass
class Pace:
    """What the iterations of one way took, in seconds, and the new tokens they brought."""

    iterations: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.iterations += 1
        if self.iterations > 1:
            self.seconds += seconds
            self.tokens += tokens

    @property
    def seconds_a_token(self) -> float:
        return self.seconds / self.tokens


@dataclass(eq=False)
class TreeIfFaster:
    """Drafts trees of this shape where they bring more tokens a second than sequences, and else sequences.

    The two take turns at first. What was measured is kept for the next answers: use one object for a base and its
    twig, a machine and a batch size. Times vary, so drafts and passes of two runs may differ; the text does not.
    """

    tree: Tree = field(default_factory=Tree)
    paces: dict[Way, Pace] = field(
        default_factory=lambda: {"sequence": Pace(), "tree": Pace()}, init=False, repr=False
    )

    def way(self) -> Way:
        """Return the faster way; before both are tried, the one that was tried less."""
        rarer = min(self.paces, key=lambda way: self.paces[way].iterations)
        if self.paces[rarer].iterations < TRIED:
            return rarer
        return min(self.paces, key=lambda way: self.paces[way].seconds_a_token)


class FasterDrafter(Drafter[Drafts]):
    """Two drafters, of which one is used in each iteration. What the twig has not read goes from one to the other."""

    def __init__(self, sequence: SequenceDrafter, tree: TreeDrafter, measured: TreeIfFaster):
        super().__init__(sequence.session)
        self.drafters: dict[Way, Drafter[Any]] = {"sequence": sequence, "tree": tree}
        self.measured = measured
        self.now: Way = "sequence"  # what this iteration drafts
        self.last_confirmed: float | None = None

    def draft(self, texts: Sequence[Sequence[int]], starts: Sequence[int], limits: Sequence[int]) -> Drafts:
        self.now = self.measured.way()
        drafter = self.drafters[self.now]
        drafter.unread, drafter.output = self.unread, self.output
        return drafter.draft(texts, starts, limits)

    def confirm(self, drafts: Drafts, columns: Sequence[Sequence[int]]) -> None:
        drafter = self.drafters[self.now]
        drafter.confirm(drafts, columns)
        self.unread, self.output = drafter.unread, drafter.output
        self._measure(sum(len(taken) + 1 for b, taken in enumerate(columns) if drafts.count(b)))

    def _measure(self, tokens: int) -> None:
        """Count an iteration, from one confirmation to the next. An answer's first one reads the prompts, too."""
        now = time.perf_counter()
        if self.last_confirmed is not None:
            self.measured.paces[self.now].add(now - self.last_confirmed, tokens)
        self.last_confirmed = now
