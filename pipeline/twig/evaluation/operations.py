"""Multiply-adds of an answer, counted from the positions that each group of layers computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from pipeline.twig.base import Base
from pipeline.twig.decoding.generate import Answers
from pipeline.twig.module import Twig


@dataclass(frozen=True)
class Operations:
    """Parameters of a layer of each group, and of the heads, by the names of `Answers.rows`.

    A position costs one multiply-add a parameter of a layer or head. The products of attention, which grow with the
    context, the embeddings and the vision tower are not counted.
    """

    parameters: Mapping[str, float]

    @classmethod
    def of(cls, base: Base, twig: Twig | None) -> Operations:
        """Return the parameters of a base and of its twig, grouped as `Answers.rows` are."""
        first, wipe = (
            (0, len(base.layers)) if twig is None else (twig.geometry.attach_layer, twig.geometry.wipe_layer)
        )
        groups = {
            "shallow": base.layers[:first],
            "middle": base.layers[first:wipe],
            "deep": base.layers[wipe:],
        }
        own_head = 0
        if twig is not None:
            groups["own"] = list(twig.layers)
            own_head = _size([twig.head]) if twig.short_weight is None else twig.short_weight.numel()
        means = {name: _size(layers) / len(layers) if layers else 0.0 for name, layers in groups.items()}
        return cls({**means, "head": _size([base.head]), "own_head": own_head})

    def of_answers(self, answers: Answers) -> float:
        """Return the multiply-adds of a batch."""
        return sum(rows * self.parameters[name] for name, rows in answers.rows.items())


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
