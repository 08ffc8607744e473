"""Tensors held in memory by name, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class TensorCache:
    """Tensors by name, least recently used out first: a shuffled epoch meets an image many times.

    Holds nothing at 0 bytes. Not shared between processes: each data-loading worker has its own.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.held: OrderedDict[str, Tensor] = OrderedDict()
        self.num_bytes = 0

    def get(self, name: str) -> Tensor | None:
        if name in self.held:
            self.held.move_to_end(name)
        return self.held.get(name)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Hold a copy of the tensor, if it fits; returns the tensor itself."""
        if name not in self.held and tensor.nbytes <= self.max_bytes:
            self.held[name] = tensor.detach().clone()
            self.num_bytes += tensor.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self.held.popitem(last=False)[1].nbytes
        return tensor
