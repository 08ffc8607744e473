"""What every way to draft has in common: drafts in columns, and a twig that reads the confirmed text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pipeline.twig.decoding.choosing import Verdict
from pipeline.twig.decoding.session import Session


@dataclass(kw_only=True)
class Drafts(ABC):
    """The drafts of a batch that one verification judges, in columns.

    `states` 'B Q D' and `rows` 'B Q' (-1: none) are the outputs of layer K and the positions, in blocks of columns.
    `visible` bool 'B n n' says which of the n columns each one sees; None: all up to itself.
    """

    states: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    visible: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return sum(rows.shape[1] for rows in self.rows)

    @abstractmethod
    def count(self, sample: int) -> int:
        """Return how many drafts a sample has."""

    @abstractmethod
    def walk(self, sample: int, verdict: Verdict) -> tuple[list[int], list[int]]:
        """Return the columns of a sample's accepted drafts, and its new tokens: these, and the base's own."""


Made = TypeVar("Made", bound=Drafts)


class Drafter(ABC, Generic[Made]):
    """The twig of a session, and what it has not read yet.

    `unread` are outputs of layer K 'B Q D' and rows 'B Q', in order. `output` 'B D' is the twig's, of the last layer
    at the last position read, if that is the newest.
    """

    def __init__(self, session: Session):
        assert session.twig is not None and session.own is not None
        self.session, self.twig, self.own = session, session.twig, session.own
        self.unread: list[tuple[Tensor, Tensor]] = []
        self.output: Tensor | None = None

    @abstractmethod
    def draft(self, texts: Sequence[Sequence[int]], starts: Sequence[int], limits: Sequence[int]) -> Made:
        """Return drafts of each sample, the first one at position `starts`, at most `limits` behind one another.

        `texts` are the tokens of prompt and answer, for looking up.
        """

    @abstractmethod
    def confirm(self, drafts: Made, columns: Sequence[Sequence[int]]) -> None:
        """Forget the drafts of each sample but those of `columns`, in every cache."""

    def confirmed(self, states: Tensor, rows: Tensor) -> None:
        """Take the newest confirmed token: its output of layer K 'B 1 D', and its row 'B 1'."""
        self.unread.append((states, rows))
        self.output = None

    def newest(self) -> Tensor:
        """Return the twig's output at the newest position 'B D', after it has read all that it has not."""
        if self.output is None:
            states, rows = (torch.cat(parts, dim=1) for parts in zip(*self.unread, strict=True))
            self.output, self.unread = self.own.run(states, rows)[:, -1], []
        return self.output
