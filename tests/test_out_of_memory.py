"""Stage 1 where memory runs out: tried again, then halved; what does not fit alone is rejected with its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from watched import before_forward

from cache import Span, Store, summarise, verify
from pipeline.data.conversation import TokenizedSample
from pipeline.data.shards import Sample
from pipeline.teacher_cache.capture import is_out_of_memory
from pipeline.teacher_cache.longest_first import Prepared, longest_first
from pipeline.teacher_cache.teacher import cache_teacher


@contextmanager
def memory_for(positions: float, *, pieces: int = 0) -> Iterator[list[int]]:
    """Memory for so many padded positions of a batch; `pieces` times it fails for nothing first.

    Gives the sizes of the batches that were tried.
    """
    asked: list[int] = []

    def allocate(layer: LlamaDecoderLayer, hidden_states: torch.Tensor) -> None:
        if layer.self_attn.layer_idx > 0 or hidden_states.is_meta:  # a trace takes no memory
            return
        num_samples, length, _ = hidden_states.shape
        asked.append(num_samples)
        if num_samples * length > positions or len(asked) <= pieces:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore to read.")

    with before_forward(LlamaDecoderLayer, allocate):
        yield asked


def longest(experiment) -> int:
    """Positions of the longest sample."""
    store = Store(experiment.store)
    return max(len(store.read(key, ["input_ids"])["input_ids"]) for key in store.keys())  # noqa: SIM118


def test_memory_in_pieces_changes_nothing(experiment, tmp_path):
    with memory_for(float("inf"), pieces=1):
        run = cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store"))
    assert run.rejected == 0
    assert summarise(tmp_path / "store").content == summarise(experiment.store).content


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(experiment, tmp_path, capfd):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", "teacher.batch_size=4")
    with memory_for(2 * longest(experiment)) as asked:
        run = cache_teacher(config)
    assert (run.seen, run.rejected) == (summarise(experiment.store).samples, 0)
    assert verify(tmp_path / "store", deep=True).problems == ()
    assert asked[:4] == [4, 4, 2, 2] and max(asked[4:]) == 2
    said = capfd.readouterr().err
    assert (
        "out of memory with 4 samples at once (CUDA out of memory. Tried to allocate 2.00 GiB.); continuing with 2"
        in said
    )
    found, undisturbed = Store(tmp_path / "store"), Store(experiment.store)
    assert list(found.keys()) == list(undisturbed.keys())
    for key in undisturbed.keys():  # noqa: SIM118
        names = list(undisturbed.manifest.specs)
        for name, expected in undisturbed.read(key, names).items():
            for mine, theirs in zip(found.read(key, names)[name], expected, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_sample_that_does_not_fit_alone_is_rejected_with_its_size(experiment, tmp_path):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", "teacher.batch_size=auto")
    with memory_for(longest(experiment) - 1):
        run = cache_teacher(config)
    store = Store(tmp_path / "store")
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert run.rejected == len(reasons) > 0 and run.seen == run.cached + run.rejected
    assert all(
        reason.startswith("does not fit into memory: ") and "positions, " in reason for reason in reasons
    )
    assert all(reason.endswith(": CUDA out of memory. Tried to allocate 2.00 GiB.") for reason in reasons)


def prepared(place: int, length: int, *images: str) -> Prepared:
    nowhere = Span("x", 0, 1)
    sample = Sample(str(place), [], (), images, (nowhere,) * len(images), nowhere, {})
    return Prepared(place, sample, TokenizedSample([], []), length)


def test_the_longest_come_first_and_samples_of_one_image_stay_together():
    items = [prepared(0, 5, "a"), prepared(1, 7), prepared(2, 9, "b"), prepared(3, 8, "a"), prepared(4, 7)]
    assert [item.place for item in longest_first(items)] == [2, 3, 0, 1, 4]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError("Unable to allocate 3 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_only_memory_is_taken_for_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory
