"""Caches in memory, bounded by bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor


class Sized(Protocol):
    """A value that knows its size in bytes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class BoundedCache(LRUCache[str, T]):
    """Values by name, least recently used out first: a shuffled epoch meets an image many times.

    Holds nothing at 0 bytes. Not shared between processes: each data-loading worker has its own.
    """

    def __init__(self, max_bytes: int):
        super().__init__(max_bytes, getsizeof=attrgetter("nbytes"))

    def put(self, name: str, value: T) -> T:
        """Hold the value, if it fits, and return it."""
        if value.nbytes <= self.maxsize:
            self[name] = value
        return value


class TensorCache(BoundedCache[Tensor]):
    """Tensors, held as copies without gradient: a view would hold the whole batch that it is cut from."""

    def put(self, name: str, value: Tensor) -> Tensor:
        """Hold a copy of the tensor, if it fits, and return the tensor itself."""
        if value.nbytes <= self.maxsize:
            self[name] = value.detach().clone()
        return value

    def of_images(self, batch: Mapping[str, Any], compute: Callable[[list[Any]], Tensor]) -> Tensor:
        """Return the features of a batch's images, in order; `compute` makes missing ones from their pixel inputs."""
        digests = batch["image_digests"]
        pixels = dict(zip(digests, batch["images"], strict=True))
        return self.stack(digests, lambda fresh: compute([pixels[digest] for digest in fresh]))

    def stack(self, names: Sequence[str], compute: Callable[[list[str]], Tensor]) -> Tensor:
        """Return the tensors of `names`, in order and stacked.

        `compute` takes the distinct names that are not held, and returns their tensors stacked in that order.
        """
        found = {name: held for name in names if (held := self.get(name)) is not None}
        if fresh := [name for name in dict.fromkeys(names) if name not in found]:
            found |= {name: self.put(name, v) for name, v in zip(fresh, compute(fresh), strict=True)}
        return torch.stack([found[name] for name in names])
