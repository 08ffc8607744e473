"""Drafts: tokens that the twig proposes, and the base's shallow states of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pipeline.twig.decoding.choosing import Choice, Drafted, Verdict
from pipeline.twig.decoding.drafter import Drafter, Drafts
from pipeline.twig.decoding.look_up import following_of_last_match
from pipeline.twig.decoding.session import Session

LONGEST_ADAPTED = 12  # drafts of an iteration under `delta: auto`


@dataclass
class SequenceDrafts(Drafts):
    """One draft behind the other.

    `tokens[b]` are those of a sample, with the column of each. `probs` has the distribution 'B V' that a column was
    drawn from, None where it was not drawn.
    """

    tokens: list[list[tuple[int, int]]]
    probs: list[Tensor | None] = field(default_factory=list)

    def count(self, sample: int) -> int:
        return len(self.tokens[sample])

    def walk(self, sample: int, verdict: Verdict) -> tuple[list[int], list[int]]:
        columns, new, place, rejected = [], [], 0, None
        for token, column in self.tokens[sample]:
            probs = self.probs[column]
            of_sample = None if probs is None else probs[sample]
            if not verdict.accepts(sample, place, token, of_sample):
                rejected = token, of_sample
                break
            new.append(token)
            columns.append(column)
            place = column + 1
        return columns, [*new, verdict.following(sample, place, rejected)]


@dataclass(frozen=True)
class DraftRules:
    """When drafting stops.

    `delta`: after so many; `auto`: one more after an iteration that accepted all, else what was accepted and one.
    `threshold` (theta): after a token of a lower probability, which is still submitted. `stop_ids`: after one of
    these. `look_up`: where the twig stopped for being unsure, the tokens that followed the last occurrence of the
    last `look_up` tokens are drafted, too; 0: never.
    """

    delta: int | Literal["auto"]
    threshold: float
    stop_ids: frozenset[int]
    look_up: int = 0


class SequenceDrafter(Drafter[SequenceDrafts]):
    """Drafts token by token.

    The last draft of an iteration is read together with the next confirmed token: where it was rejected, it never is.
    """

    def __init__(self, session: Session, choice: Choice, rules: DraftRules):
        super().__init__(session)
        self.choice, self.rules = choice, rules
        self.most = 5 if rules.delta == "auto" else rules.delta

    def draft(
        self, texts: Sequence[Sequence[int]], starts: Sequence[int], limits: Sequence[int]
    ) -> SequenceDrafts:
        limits = [min(self.most, limit) for limit in limits]
        drafts = SequenceDrafts([[] for _ in limits])
        going = [limit > 0 for limit in limits]
        unsure = [False] * len(limits)
        while any(going):
            drafted = self._drafted()
            tokens, confidence = drafted.tokens.tolist(), drafted.confidence.tolist()
            places = [
                s + len(of) if go else -1 for s, of, go in zip(starts, drafts.tokens, going, strict=True)
            ]
            self._add(drafts, drafted.tokens[:, None], [[place] for place in places], [drafted.probs])
            for b, go in enumerate(going):
                if not go:
                    continue
                drafts.tokens[b].append((tokens[b], drafts.num_columns - 1))
                unsure[b] = confidence[b] < self.rules.threshold and tokens[b] not in self.rules.stop_ids
                is_done = unsure[b] or tokens[b] in self.rules.stop_ids or len(drafts.tokens[b]) >= limits[b]
                going[b] = not is_done
        if self.rules.look_up and any(unsure):
            self._look_up(drafts, texts, starts, [n if u else 0 for n, u in zip(limits, unsure, strict=True)])
        return drafts

    def _drafted(self) -> Drafted:
        drafted = self.choice.draft(self.session.draft_logits(self.newest()))
        if (ids := self.twig.draft_ids) is None:
            return drafted
        probs = drafted.probs
        if probs is not None:  # tokens that are never drafted have a probability of zero
            whole = probs.new_zeros(len(probs), self.session.base.vocab_size)
            probs = whole.index_copy(1, ids, probs)
        return Drafted(ids[drafted.tokens], drafted.confidence, probs)

    def _add(
        self, drafts: SequenceDrafts, tokens: Tensor, places: list[list[int]], probs: Sequence[Tensor | None]
    ) -> None:
        """Run drafted tokens 'B Q' through the shallow layers."""
        rows = torch.tensor(places, device=tokens.device)
        states = self.session.read_tokens(tokens, rows)
        drafts.states.append(states)
        drafts.rows.append(rows)
        drafts.probs += probs
        self.confirmed(states, rows)

    def _look_up(
        self,
        drafts: SequenceDrafts,
        texts: Sequence[Sequence[int]],
        starts: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        found = []
        for text, of_one, limit in zip(texts, drafts.tokens, limits, strict=True):
            so_far = [*text, *(token for token, _ in of_one)]
            room = limit - len(of_one)
            found.append(following_of_last_match(so_far, self.rules.look_up, room) if room > 0 else [])
        if not (width := max(map(len, found))):
            return
        places = [
            [start + len(of_one) + n if n < len(tokens) else -1 for n in range(width)]
            for start, of_one, tokens in zip(starts, drafts.tokens, found, strict=True)
        ]
        first = drafts.num_columns
        padded = torch.tensor(
            [[*tokens, *[0] * (width - len(tokens))] for tokens in found], device=self.own.device
        )
        self._add(drafts, padded, places, [None] * width)
        for of_one, tokens in zip(drafts.tokens, found, strict=True):
            of_one += [(token, first + n) for n, token in enumerate(tokens)]

    def confirm(self, drafts: SequenceDrafts, columns: Sequence[Sequence[int]]) -> None:
        accepted = torch.zeros(len(columns), drafts.num_columns, dtype=torch.bool)
        for b, of_one in enumerate(columns):
            accepted[b, list(of_one)] = True
        accepted = accepted.to(self.own.device)
        self.session.confirm(accepted)
        self._confirm_own(accepted)
        if self.rules.delta == "auto":
            self._adapt(drafts, columns)

    def _adapt(self, drafts: SequenceDrafts, columns: Sequence[Sequence[int]]) -> None:
        """One draft more after an iteration that accepted all, else as many as were accepted and one."""
        most = max(map(len, columns))
        is_whole = any(taken and len(taken) == drafts.count(b) for b, taken in enumerate(columns))
        self.most = min(self.most + 1, LONGEST_ADAPTED) if is_whole else max(1, most + 1)

    def _confirm_own(self, accepted: Tensor) -> None:
        """Forget the drafts that were rejected, bool 'B n' by column, whether the twig has read them or not."""
        num_unread = sum(rows.shape[1] for _, rows in self.unread)
        num_read = accepted.shape[1] - num_unread
        self.session.confirm_own(accepted[:, :num_read])
        if not num_unread:
            return
        states, rows = (torch.cat(parts, dim=1) for parts in zip(*self.unread, strict=True))
        stays = accepted[:, num_read:]
        used = stays.any(dim=0)
        self.unread = [(states[:, used], rows.masked_fill(~stays, -1)[:, used])] if bool(used.any()) else []
