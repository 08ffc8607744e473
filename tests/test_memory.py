"""Tensors in memory: bounded, least recently used out first, and safe from later changes."""

from __future__ import annotations

import torch

from pipeline.distill.join.memory import TensorCache

SIXTEEN_BYTES = torch.zeros(4)


def test_the_least_recently_used_goes_first():
    cache = TensorCache(48)
    for name in "abc":
        cache.put(name, SIXTEEN_BYTES)
    assert cache.get("a") is not None
    cache.put("d", SIXTEEN_BYTES)
    assert set(cache) == {"c", "a", "d"} and cache.currsize == 48


def test_what_can_never_fit_is_not_held_and_pushes_nothing_out():
    cache = TensorCache(32)
    cache.put("a", SIXTEEN_BYTES)
    large = torch.zeros(9)
    assert cache.put("b", large) is large
    assert set(cache) == {"a"} and cache.get("b") is None


def test_nothing_is_held_in_no_bytes():
    cache = TensorCache(0)
    cache.put("a", SIXTEEN_BYTES)
    assert cache.get("a") is None and cache.currsize == 0


def test_a_name_held_already_is_not_counted_twice():
    cache = TensorCache(32)
    cache.put("a", SIXTEEN_BYTES)
    cache.put("a", SIXTEEN_BYTES)
    assert cache.currsize == 16


def test_what_is_held_is_a_copy_without_gradient():
    cache = TensorCache(1000)
    batch = torch.zeros(1000, requires_grad=True)
    row = batch[:4] * 1
    cache.put("a", row)
    with torch.no_grad():
        row += 1
    held = cache.get("a")
    assert held is not None and not held.any() and not held.requires_grad
    assert held.untyped_storage().nbytes() == 16  # a view would hold the whole batch


def test_only_what_is_not_held_is_computed_each_name_once():
    cache, asked = TensorCache(16), []

    def compute(names: list[str]) -> torch.Tensor:
        asked.append(names)
        return torch.stack([torch.full((4,), float(ord(name))) for name in names])

    for names in ("abba", "ac", "ca"):
        stacked = cache.stack(list(names), compute)
        assert stacked[:, 0].tolist() == [float(ord(name)) for name in names] and stacked.shape[1:] == (4,)
    # 16 bytes hold one tensor, the last that was put.
    assert asked == [["a", "b"], ["a", "c"], ["a"]]
