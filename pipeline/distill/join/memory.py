"""What is held in memory by name, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Sized(Protocol):
    """Anything that knows how many bytes it holds."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class BoundedCache(Generic[T]):
    """Values by name, least recently used out first: a shuffled epoch meets an image many times.

    Holds nothing at 0 bytes. Not shared between processes: each data-loading worker has its own.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.held: OrderedDict[str, T] = OrderedDict()
        self.num_bytes = 0

    def get(self, name: str) -> T | None:
        if name in self.held:
            self.held.move_to_end(name)
        return self.held.get(name)

    def put(self, name: str, value: T) -> T:
        """Hold the value, if it fits, and return it."""
        if name not in self.held and value.nbytes <= self.max_bytes:
            self.held[name] = value
            self.num_bytes += value.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self.held.popitem(last=False)[1].nbytes
        return value


class TensorCache(BoundedCache[Tensor]):
    """Tensors, held as copies without gradient: a view would hold the whole batch that it is cut from."""

    def put(self, name: str, value: Tensor) -> Tensor:
        """Hold a copy of the tensor, if it fits; returns the tensor itself."""
        if name not in self.held and value.nbytes <= self.max_bytes:
            super().put(name, value.detach().clone())
        return value

    def of_images(self, batch: Mapping[str, Any], compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Features of a batch's images, in order; `compute` makes those not held from their pixels 'I C Y X'."""
        row = {digest: number for number, digest in enumerate(batch["image_digests"])}
        return self.stack(
            batch["image_digests"], lambda fresh: compute(batch["pixel_values"][[row[d] for d in fresh]])
        )

    def stack(self, names: Sequence[str], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """The tensors of `names`, in order and stacked; `compute` makes those not held, each distinct one once.

        It is given their names and returns their tensors, stacked in that order.
        """
        found = {name: held for name in names if (held := self.get(name)) is not None}
        if fresh := [name for name in dict.fromkeys(names) if name not in found]:
            found |= {name: self.put(name, v) for name, v in zip(fresh, compute(fresh), strict=True)}
        return torch.stack([found[name] for name in names])
