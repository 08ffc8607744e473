"""The loss terms in the log: their means since the last line, and each one's share of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.distill.model.loss_module import Terms


@dataclass
class TermLog:
    """Sums and counts of every loss term since the last log line, in this process."""

    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    # float32, as the Trainer adds up its own
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, terms: Terms | None, loss: torch.Tensor) -> None:
        """Add a batch; of a filler `terms` is None."""
        self.loss += loss.detach().cpu()
        if terms is None:
            return
        for name, (total, count) in terms.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(total.detach())
            self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def sums(self, names: Sequence[str]) -> list[float]:
        """Return everything as numbers that can be summed over processes. `of` reads them back."""
        of_terms = [sums.get(name, 0.0) for name in names for sums in (self.totals, self.counts)]
        return [*of_terms, float(self.loss)]

    @classmethod
    def of(cls, names: Sequence[str], sums: Sequence[float]) -> TermLog:
        *of_terms, loss = sums
        totals, counts = (dict(zip(names, of_terms[n::2], strict=True)) for n in (0, 1))
        return cls(totals, counts, torch.tensor(loss))

    def means(self, losses: Mapping[str, Any]) -> dict[str, float]:
        """Return each term's mean (`loss/x`) and weighted mean (`loss/x_weighted`)."""
        entries = {}
        for name, settings in losses.items():
            mean = self.mean(name)
            entries |= {f"loss/{name}": mean, f"loss/{name}_weighted": settings.weight * mean}
        return entries

    def mean(self, name: str) -> float:
        """Return the mean of a term, or of what is observed beside the losses."""
        return self.totals[name] / max(self.counts[name], 1.0)


def gradient_shares(
    weighted: Mapping[str, torch.Tensor],
    student: nn.Module,
    *,
    of_all: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Return `gradient_share/x`: the norm of a weighted term's gradient, divided by the sum of all terms' norms.

    Each term costs one more backward pass, over the step's last micro-batch. Heads are left out, because the labels
    have none. `of_all` sums a gradient over all processes, because norms of parts do not add up to that of the whole.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    norms = {}
    for name, term in weighted.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        if of_all is not None:  # zeros where this process has none: all must add up the same tensors
            gradients = [
                of_all(torch.zeros_like(p) if g is None else g)
                for p, g in zip(parameters, gradients, strict=True)
            ]
        norms[name] = torch.stack([g.float().norm() for g in gradients if g is not None]).norm().item()
    total = sum(norms.values())
    return {f"gradient_share/{name}": norm / total if total else 0.0 for name, norm in norms.items()}
