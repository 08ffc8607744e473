"""Stage 1 where memory runs out: tried again, then halved; what does not fit alone is rejected with its size."""

from __future__ import annotations

import pytest
import torch

from cache import Span, Store, summarise, verify
from pipeline.data.conversation import TokenizedSample
from pipeline.data.shards import Sample
from pipeline.models.stub import Teacher
from pipeline.teacher_cache.capture import is_out_of_memory
from pipeline.teacher_cache.longest_first import Prepared, longest_first
from pipeline.teacher_cache.teacher import cache_teacher

forward = Teacher.forward


@pytest.fixture
def memory_for(monkeypatch):
    """A device that holds so many padded positions of a batch; `pieces` times it fails for nothing first."""

    def limit(positions: float, *, pieces: int = 0) -> list[int]:
        asked: list[int] = []

        def run(self, input_ids, *arguments, **named):
            asked.append(len(input_ids))
            if input_ids.numel() > positions or len(asked) <= pieces:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore to read.")
            return forward(self, input_ids, *arguments, **named)

        monkeypatch.setattr(Teacher, "forward", run)
        return asked

    return limit


def longest(experiment) -> int:
    """Tokens of the longest sample."""
    store = Store(experiment.store)
    return max(store.rows(key, "input_ids") for key in store.keys())  # noqa: SIM118


def test_memory_in_pieces_changes_nothing(experiment, memory_for, tmp_path):
    memory_for(float("inf"), pieces=1)
    run = cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store"))
    assert run.rejected == 0
    assert summarise(tmp_path / "store").content == summarise(experiment.store).content


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(experiment, memory_for, tmp_path, capfd):
    asked = memory_for(2 * longest(experiment))
    run = cache_teacher(experiment.config(tmp_path, f"cache.path={tmp_path}/store", "teacher.batch_size=4"))
    assert (run.seen, run.rejected) == (summarise(experiment.store).samples, 0)
    assert verify(tmp_path / "store", deep=True).problems == ()
    assert asked[:4] == [4, 4, 2, 2] and max(asked[4:]) == 2
    said = capfd.readouterr().err
    assert (
        "out of memory with 4 samples at once (CUDA out of memory. Tried to allocate 2.00 GiB.); going on with 2"
        in said
    )
    found, undisturbed = Store(tmp_path / "store"), Store(experiment.store)
    assert list(found.keys()) == list(undisturbed.keys())
    for key in undisturbed.keys():  # noqa: SIM118
        names = list(undisturbed.manifest.specs)
        for name, expected in undisturbed.read(key, names).items():
            torch.testing.assert_close(
                torch.from_numpy(found.read(key, names)[name]),
                torch.from_numpy(expected),
                rtol=1e-3,
                atol=1e-3,
            )


def test_a_sample_that_does_not_fit_alone_is_rejected_with_its_size(experiment, memory_for, tmp_path):
    memory_for(longest(experiment) - 1)
    run = cache_teacher(
        experiment.config(tmp_path, f"cache.path={tmp_path}/store", "teacher.batch_size=auto")
    )
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
