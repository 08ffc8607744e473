"""Leases: one writer a part, the dead are followed, the living are left alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from small_store import manifest

from cache import StoreWriter, verify
from cache.write.leases import lease, lease_holder
from cache.write.scratch import new_scratch

PART = "shard-000000"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return StoreWriter.open(tmp_path / "s", manifest()).path


def leave_lease(store: Path, *, process: int, host: str | None = None, age: float = 0) -> Path:
    """A lease as another process would have left it."""
    name = new_scratch(store, PART).name.replace(f".{os.getpid()}.", f".{process}.")
    if host:
        mine = name.split(".")[1]
        name = name.replace(f".{mine}.", f".{host}.")
    file = store / "leases" / PART
    file.write_text(name)
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_part_is_held_by_one_and_free_after(store: Path) -> None:
    with lease(store, PART) as first, lease(store, PART) as second, lease(store, "shard-000001") as other:
        assert (first, second, other) == (True, False, True)
    assert not list((store / "leases").iterdir()) and not list((store / "tmp").iterdir())
    with lease(store, PART) as again:
        assert again


def test_an_exception_frees_the_part(store: Path) -> None:
    with pytest.raises(RuntimeError), lease(store, PART):
        raise RuntimeError
    assert not list((store / "leases").iterdir())


def test_the_lease_of_a_dead_process_of_this_host_is_taken_at_once(store: Path) -> None:
    leave_lease(store, process=4194305)  # above the largest process id
    with lease(store, PART, patience=1000) as ours:
        assert ours and f".{os.getpid()}." in lease_holder(store / "leases" / PART)


def test_another_hosts_lease_is_taken_when_it_was_not_touched_for_long(store: Path) -> None:
    leave_lease(store, process=1, host="another-host", age=50)
    with lease(store, PART, patience=100) as ours:
        assert not ours
    with lease(store, PART, patience=40) as ours:
        assert ours


def test_a_holder_at_work_keeps_its_lease_fresh(store: Path) -> None:
    with lease(store, PART, patience=0.4) as ours:
        assert ours
        time.sleep(1.0)  # longer than the patience: without heartbeats another would have it
        with lease(store, PART, patience=0.4) as other:
            assert not other


def test_who_lost_its_lease_does_not_take_the_next_ones_away(store: Path) -> None:
    with lease(store, PART):
        taken_over = leave_lease(store, process=1, host="another-host")
    assert taken_over.exists() and "another-host" in lease_holder(taken_over)


def test_a_lease_is_told_by_verify_and_swept_when_its_holder_is_dead(store: Path) -> None:
    leave_lease(store, process=4194305)
    (problem,) = [p for p in verify(store, deep=False).problems if p.kind == "unfinished part"]
    assert problem.file == f"leases/{PART}" and "which no longer runs" in problem.detail
    StoreWriter.open(store, manifest())
    assert not list((store / "leases").iterdir())
