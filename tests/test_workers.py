"""Several workers on one store: every shard written once, the dead followed, the result that of one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache import DuplicateKey, Store, merge_stores, summarise, verify
from pipeline.errors import ConfigError
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.teacher_cache.workers import Worker, worker_of

ROOT = Path(__file__).parent.parent
SHARDS = [f"shard-{number:06d}.tar" for number in range(7)]

WORK = """
import sys
import pipeline.teacher_cache.workers
from pipeline.config.config import load_config
from pipeline.teacher_cache.teacher import cache_teacher
pipeline.teacher_cache.workers.POLL_SECONDS = 0.1
print("ready", flush=True)
sys.stdin.readline()
cache_teacher(load_config(sys.argv[1], sys.argv[2:]), pipeline.teacher_cache.workers.worker_of(None, None))
"""


def test_every_worker_begins_with_its_own_share_and_knows_all_shards():
    orders = [Worker(rank, 3).in_order(SHARDS) for rank in range(3)]
    assert [order[0] for order in orders] == SHARDS[:3]
    assert orders[1] == [SHARDS[n] for n in (1, 4, 2, 5, 0, 3, 6)]
    assert all(sorted(order) == SHARDS for order in orders)


def test_the_worker_is_that_of_the_options_else_of_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (worker_of(None, None), worker_of(0, 3)) == (Worker(2, 4), Worker(0, 3))
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert worker_of(None, None) == Worker(0, 1)


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (3, 3, r"rank 3 of 3: expected a rank from 0 to world size - 1"),
        (1, None, r"--rank and --world-size go together: give both, or neither"),
    ],
)
def test_a_rank_that_cannot_be_is_a_sentence(rank, world_size, message):
    with pytest.raises(ConfigError, match=message):
        worker_of(rank, world_size)


def test_a_number_of_workers_that_is_none_is_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE='many' in the environment: expected a number"):
        worker_of(None, None)


def start(arguments: list[str], rank: int, world_size: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "RANK": str(rank), "WORLD_SIZE": str(world_size),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", WORK, *arguments], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def go(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def test_four_processes_at_once_write_what_one_writes(experiment, tmp_path):
    store = tmp_path / "store"
    processes = [start([str(experiment.file), f"cache.path={store}"], rank, 4) for rank in range(4)]
    go(processes)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert summarise(store).content == summarise(experiment.store).content
    assert verify(store, deep=True).problems == ()


def test_the_shard_of_a_killed_worker_is_taken_over(experiment, tmp_path):
    store = tmp_path / "store"
    arguments = [str(experiment.file), f"cache.path={store}"]
    victim = start(arguments, 0, 2)
    go([victim])
    while not list((store / "leases").glob("*")):
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    cache_teacher(experiment.config(tmp_path, f"cache.path={store}"), Worker(1, 2))
    assert Store(store).missing_parts == ()
    assert summarise(store).content == summarise(experiment.store).content
    assert not list((store / "leases").iterdir())


def test_stores_that_hold_one_key_in_two_parts_are_not_merged(experiment, tmp_path):
    for number in range(2):  # the same samples as two shards, each in a store of its own
        shard = tmp_path / "shards" / f"copy-{number}.tar"
        shard.parent.mkdir(exist_ok=True)
        shutil.copy(experiment.shard(0), shard)
        cache_teacher(experiment.config(tmp_path, f"data.shards={shard}", f"cache.path={tmp_path}/{number}"))
    with pytest.raises(
        DuplicateKey, match=r"appears in parts 'copy-0' and 'copy-1'; give every sample of all shards"
    ):
        merge_stores([Store(tmp_path / "0"), Store(tmp_path / "1")], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_key_in_shards_of_two_workers_is_cached_once(experiment, tmp_path):
    for number in range(2):
        shard = tmp_path / "shards" / f"copy-{number}.tar"
        shard.parent.mkdir(exist_ok=True)
        shutil.copy(experiment.shard(0), shard)
    store = tmp_path / "both"
    arguments = [str(experiment.file), f"data.shards={tmp_path}/shards", f"cache.path={store}"]
    processes = [start(arguments, rank, 2) for rank in range(2)]
    go(processes)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert verify(store, deep=True).problems == () and len(Store(store)) == 5
    assert sum(len(Store(store).rejects(part)) for part in Store(store).parts) == 5
