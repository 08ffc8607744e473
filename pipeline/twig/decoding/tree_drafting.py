"""Drafting a tree: level by level, and then the most probable nodes of all levels are verified together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.twig.decoding.choosing import Choice, Verdict
from pipeline.twig.decoding.drafter import Drafter, Drafts
from pipeline.twig.decoding.session import Session
from pipeline.twig.decoding.tree import Growth, Node, Tree

OfNode = Callable[[Node], int]


@dataclass
class TreeDrafts(Drafts):
    """The chosen nodes of each sample; a column is a node's place.

    The shallow layers have read `num_shallow` nodes, in the order of their columns, the twig the first `num_own`.
    """

    chosen: list[list[Node]]
    num_shallow: int
    num_own: int

    def count(self, sample: int) -> int:
        return len(self.chosen[sample])

    def walk(self, sample: int, verdict: Verdict) -> tuple[list[int], list[int]]:
        """Go from the root to the child that is the base's own token, as long as there is one.

        Each token is the base's own, drawn or most probable. The tree says only how many of them one pass finds.
        """
        children = {(node.parent, node.token): node for node in self.chosen[sample]}
        columns, new = [], [verdict.following(sample, 0, None)]
        node = None
        while (node := children.get((node, new[-1]))) is not None:
            columns.append(node.place)
            new.append(verdict.following(sample, node.place + 1, None))
        return columns, new


class TreeDrafter(Drafter[TreeDrafts]):
    """Drafts trees. The twig's cache holds confirmed text alone between iterations: it reads accepted nodes again."""

    def __init__(self, session: Session, choice: Choice, tree: Tree, stop_ids: frozenset[int]):
        super().__init__(session)
        self.choice, self.tree, self.stop_ids = choice, tree, stop_ids

    def draft(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], limits: Sequence[int]
    ) -> TreeDrafts:
        roots = [[None] if limit > 0 else [] for limit in limits]
        grown = [Growth() for _ in limits]
        self._add_children(grown, roots, self.newest()[:, None])
        blocks = _Blocks(self.session, starts)
        for depth in range(1, self.tree.depth):
            parents = [
                one.expandable(self.tree.expanded, self.stop_ids) if depth < limit else []
                for one, limit in zip(grown, limits, strict=True)
            ]
            if not any(parents):
                break
            states, rows, visible = blocks.read(parents)
            self._add_children(grown, parents, self.own.run(states, rows, visible))
        return self._drafts(blocks, [one.chosen(self.tree.nodes) for one in grown])

    def _add_children(
        self, grown: Sequence[Growth], parents: Sequence[Sequence[Node | None]], hidden: Tensor
    ) -> None:
        """Add the children of `parents`, at which the twig's output is `hidden` 'B Q D'."""
        scores = self.choice.log_probs(self.session.draft_logits(hidden))
        best, ids = scores.topk(min(self.tree.children, scores.shape[-1]))
        if self.twig.draft_ids is not None:
            ids = self.twig.draft_ids[ids]
        for one, of_one, tokens, values in zip(grown, parents, ids.tolist(), best.tolist(), strict=True):
            one.add(of_one, tokens, values)

    def _drafts(self, blocks: _Blocks, chosen: list[list[Node]]) -> TreeDrafts:
        """Read the chosen nodes that were not expanded, and line all chosen ones up."""
        num_own = blocks.num_columns
        unread = [[node for node in nodes if node.column < 0] for nodes in chosen]
        if any(unread):
            blocks.read(unread)
        columns = _padded(chosen, lambda node: node.column, 0).to(self.own.device)
        num_places = columns.shape[1]
        return TreeDrafts(
            chosen=chosen,
            num_shallow=blocks.num_columns,
            num_own=num_own,
            states=[_picked(torch.cat(blocks.states, dim=1), columns)],
            rows=[blocks.rows(chosen)],
            visible=_visible(chosen, num_places, lambda node: node.place).to(self.own.device),
        )

    def confirm(self, drafts: TreeDrafts, columns: Sequence[Sequence[int]]) -> None:
        accepted = [[of[column] for column in some] for of, some in zip(drafts.chosen, columns, strict=True)]
        places, shallow = (
            _padded(accepted, of, -1).to(self.own.device) for of in (lambda n: n.place, lambda n: n.column)
        )
        self.session.shallow.keep(drafts.num_shallow, shallow)
        for group in (self.session.middle, self.session.deep):
            group.keep(drafts.num_columns, places)
        self.own.crop(self.own.length - drafts.num_own)
        rows = drafts.rows[0].gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)
        self.unread.append((_picked(drafts.states[0], places.clamp(min=0)), rows))


class _Blocks:
    """The nodes that the shallow layers have read in this iteration, in blocks: their outputs 'B Q D' each."""

    def __init__(self, session: Session, starts: Sequence[int]):
        self.session, self.starts = session, starts
        self.num_columns = 0
        self.states: list[Tensor] = []

    def read(self, nodes: Sequence[Sequence[Node]]) -> tuple[Tensor, Tensor, Tensor]:
        """Read nodes of each sample, and give them their columns. Return outputs, rows, and what each one sees."""
        for of_sample in nodes:
            for slot, node in enumerate(of_sample):
                node.column = self.num_columns + slot
        rows = self.rows(nodes)
        self.num_columns += rows.shape[1]
        visible = _visible(nodes, self.num_columns, lambda node: node.column).to(rows.device)
        tokens = _padded(nodes, lambda node: node.token, 0).to(rows.device)
        self.states.append(self.session.read_tokens(tokens, rows, visible))
        return self.states[-1], rows, visible

    def rows(self, nodes: Sequence[Sequence[Node]]) -> Tensor:
        """Return the positions 'B Q' of nodes of each sample, -1 where there is none."""
        depths = _padded(nodes, lambda node: node.depth, 0)
        starts = torch.tensor(self.starts)[:, None]
        return (starts + depths - 1).masked_fill(depths == 0, -1).to(self.session.shallow.device)


def _padded(nodes: Sequence[Sequence[Node]], of: OfNode, pad: int) -> Tensor:
    """Return a number of each node, int64 'B Q'."""
    width = max(map(len, nodes))
    values = [[*map(of, of_sample), *[pad] * (width - len(of_sample))] for of_sample in nodes]
    return torch.tensor(values, dtype=torch.long).view(len(nodes), width)


def _visible(nodes: Sequence[Sequence[Node]], num_columns: int, column: OfNode) -> Tensor:
    """Return which of the columns each node sees, its ancestors' and its own: bool 'B Q C'."""
    seen = [
        (b, q, column(other))
        for b, of_sample in enumerate(nodes)
        for q, node in enumerate(of_sample)
        for other in node.path()
    ]
    visible = torch.zeros(len(nodes), max(map(len, nodes)), num_columns, dtype=torch.bool)
    visible[tuple(torch.tensor(seen).T)] = True
    return visible


def _picked(states: Tensor, columns: Tensor) -> Tensor:
    """Return columns 'B Q' of 'B C D': 'B Q D'."""
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[2]))
