"""Trees of drafts: their shape, and the nodes of one sample (EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from math import inf

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Tree:
    """The shape of a tree of drafts.

    `children`   next tokens that are tried at a node, the most probable ones
    `expanded`   nodes of a level that get children, the most probable ones
    `depth`      levels: most drafts behind one another
    `nodes`      drafts that are verified, the most probable ones of all levels
    """

    children: int = 10
    expanded: int = 10
    depth: int = 4
    nodes: int = 60

    def __post_init__(self) -> None:
        for of_shape in fields(self):
            value = getattr(self, of_shape.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"tree: {of_shape.name}: expected a number from 1 on, found {value!r}")


@dataclass(eq=False)
class Node:
    """A drafted token behind its parent (None: behind the confirmed text).

    `score` is the log probability of its path, `depth` is 1 behind the confirmed text. `column` is its place among
    the nodes that the shallow layers have read, `place` its place among those that are verified.
    """

    token: int
    score: float
    parent: Node | None
    column: int = -1
    place: int = -1
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth = self.parent.depth + 1 if self.parent else 1

    def path(self) -> Iterator[Node]:
        """Yield it and its ancestors, itself first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


@dataclass
class Growth:
    """The nodes of one sample in the order they are made, and the newest level of them."""

    nodes: list[Node] = field(default_factory=list)
    level: list[Node] = field(default_factory=list)

    def add(
        self,
        parents: Sequence[Node | None],
        tokens: Sequence[Sequence[int]],
        scores: Sequence[Sequence[float]],
    ) -> None:
        """Make the next level: the children of each parent, with the log probability of each."""
        self.level = [
            Node(token, (parent.score if parent else 0.0) + min(score, 0.0), parent)
            for parent, of_tokens, of_scores in zip(parents, tokens, scores, strict=False)
            for token, score in zip(of_tokens, of_scores, strict=True)
            if score > -inf
        ]
        self.nodes += self.level

    def expandable(self, most: int, stop_ids: Collection[int]) -> list[Node]:
        """Return the most probable nodes of the newest level that are no stop tokens."""
        return _best([node for node in self.level if node.token not in stop_ids], most)

    def chosen(self, most: int) -> list[Node]:
        """Return the most probable nodes, each behind its parent, and give them their places.

        No node is more probable than its parent, and of equal ones the parent was made before: so it is chosen, too.
        """
        best = _best(self.nodes, most)
        for place, node in enumerate(best):
            node.place = place
        return best


def _best(nodes: Sequence[Node], most: int) -> list[Node]:
    return sorted(nodes, key=lambda node: -node.score)[:most]  # equal ones stay in their order
