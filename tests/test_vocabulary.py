"""Log probabilities of a few tokens against torch's own over the whole vocabulary, values, gradients and memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from pipeline.targets.vocabulary import score_answers, with_tail

A, V, K = 7, 50, 4


def drawn(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(A, V, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(A)])
    return logits, ids


@pytest.fixture(params=[1, 3, 100])
def piece_bytes(request) -> int:
    """Room for so many rows at once."""
    return 4 * V * request.param


def plainly(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(dim=-1)
    return log_probs.gather(1, ids), log_probs.scatter(1, ids, float("-inf")).logsumexp(dim=-1)


def test_values_and_gradients_are_those_of_log_softmax_in_float64(piece_bytes):
    logits, ids = drawn()
    weights = torch.rand(A, K + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.5
    results = []
    for function in (partial(with_tail, piece_bytes=piece_bytes), plainly):
        picked, tail = function(logits, ids)
        (picked * weights[:, :K]).sum().backward(retain_graph=True)
        (tail.exp() * weights[:, K]).sum().backward()
        results.append((picked.detach(), tail.detach(), logits.grad))
        logits.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_gradcheck_agrees(piece_bytes):
    logits, ids = drawn(seed=3)
    assert torch.autograd.gradcheck(lambda x: with_tail(x, ids, piece_bytes=piece_bytes), logits)
    labels, draws = ids[:, 1], (ids[:, :2] + 7) % V  # a label among the top, draws that may be
    for asked in ((), (ids,), (ids, draws)):
        assert torch.autograd.gradcheck(
            lambda x, asked=asked: _flat(score_answers(x, labels, *asked, piece_bytes=piece_bytes)), logits
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32_and_its_gradient_comes_back_in_its_own(dtype):
    logits, ids = drawn(dtype)
    picked, tail = with_tail(logits, ids)
    exact = plainly(logits.detach().double(), ids)
    assert picked.dtype == tail.dtype == torch.float32
    assert torch.allclose(picked.double(), exact[0], atol=1e-5)
    assert torch.allclose(tail.double(), exact[1], atol=1e-5)
    (picked.sum() + tail.sum()).backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


@pytest.mark.parametrize("num_top", [0, 1, K, V])
def test_one_pass_scores_labels_draws_the_top_and_the_tail_as_log_softmax_does(piece_bytes, num_top):
    logits, ids = drawn()
    labels, draws = ids[:, 0], ids[:, 2:]  # the label among the top: their gradients add up
    top = torch.stack([torch.cat([row, torch.arange(V)]).unique(sorted=False)[:num_top] for row in ids])
    log_probs = logits.log_softmax(dim=-1)
    wanted = [log_probs.gather(1, some).flatten() for some in (labels[:, None], top, draws)]
    if 0 < num_top < V:
        wanted.append(plainly(logits, top)[1])
    scores = score_answers(logits, labels, top if num_top else None, draws, piece_bytes=piece_bytes)
    found = [x.flatten() for x in (scores.label, scores.top, scores.draws)] + [scores.tail][: len(wanted) - 3]
    assert len(scores.tail) == (A if 0 < num_top < V else 0)
    weights = torch.rand(sum(map(len, wanted)), dtype=torch.float64)
    gradients = [torch.autograd.grad((torch.cat(of) * weights).sum(), logits)[0] for of in (found, wanted)]
    assert torch.allclose(torch.cat(found), torch.cat(wanted), rtol=1e-12, atol=1e-14)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-14)


def _flat(scores) -> tuple[Tensor, ...]:
    return tuple(x for x in (scores.label, scores.top, scores.tail, scores.draws) if x.numel())


def test_nothing_as_wide_as_the_vocabulary_is_kept_but_the_logits_themselves():
    logits, ids = drawn(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
        picked, tail = with_tail(logits, ids)
        (picked.sum() + tail.sum()).backward()
    wide = {tensor.data_ptr() for tensor in kept if tensor.shape == logits.shape}
    assert wide == {logits.data_ptr()}
