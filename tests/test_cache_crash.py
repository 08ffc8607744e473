"""A writer killed at any moment leaves a part wholly there or still to do, and the next one cleans up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import fill_part, manifest, snapshot

from cache import StoreWriter, verify
from cache.write.scratch import new_scratch

pytestmark = pytest.mark.slow

PART = "shard-000000"


def finish(writer: StoreWriter, name: str, prefix: str) -> None:
    with writer.part(name, source={}) as part:
        fill_part(part, prefix)
        part.commit(seen=4)


KILLED = """
import os, signal, sys
from small_store import fill_part, manifest
from cache import StoreWriter
path, call, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, call), 0
def kill_at(*arguments, **named):
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
with StoreWriter.open(path, manifest()).part("shard-000000", source={}) as part:
    fill_part(part, "a")
    setattr(os, call, kill_at)
    part.commit()
"""


# At the first file, among the arrays, at the index, at the done-mark's own sync, and at the rename.
@pytest.mark.parametrize(("call", "number"), [("fsync", n) for n in (1, 8, 19, 24, 28)] + [("rename", 1)])
def test_a_killed_commit_leaves_the_part_to_do_and_the_rest_unchanged(
    tmp_path: Path, call: str, number: int
) -> None:
    path = tmp_path / "s"
    finish(StoreWriter.open(path, manifest()), "shard-000001", "b")
    before = snapshot(path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", "."])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), call, str(number)], env=environment)
    assert process.wait() == -signal.SIGKILL
    left = list((path / "tmp").iterdir())
    assert len(left) == 1 and f".{process.pid}." in left[0].name
    kinds = {problem.kind for problem in verify(path, deep=True).problems}
    assert kinds == {"unfinished part", "missing part"}

    writer = StoreWriter.open(path, manifest())
    assert snapshot(path) == before and not list((path / "tmp").iterdir())
    assert not writer.is_done(PART) and writer.is_done("shard-000001")
    finish(writer, PART, "a")
    assert verify(path, deep=True).problems == ()


def test_a_part_whose_replacement_was_killed_half_way_is_put_back(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, manifest())
    finish(writer, PART, "a")
    before = snapshot(tmp_path / "parts")
    aside = new_scratch(tmp_path, f"{PART}.replaced")
    os.rename(tmp_path / "parts" / PART, aside.with_name(aside.name.replace(f".{os.getpid()}.", ".4194305.")))
    assert StoreWriter.open(tmp_path, manifest()).is_done(PART)
    assert snapshot(tmp_path / "parts") == before and not list((tmp_path / "tmp").iterdir())


def test_what_a_process_of_another_container_on_this_host_writes_is_not_swept(tmp_path: Path) -> None:
    """Containers may share a host's name, and their process ids mean nothing here."""
    StoreWriter.open(tmp_path, manifest())
    name = new_scratch(tmp_path, "shard-000000").name
    host = name.split(".")[1]
    elsewhere = name.replace(host, host.rsplit("-", 1)[0] + "-0123456789ab").replace(
        f".{os.getpid()}.", ".4194305."
    )
    (tmp_path / "tmp" / elsewhere).mkdir()
    (tmp_path / "leases" / "shard-000000").write_text(elsewhere)
    writer = StoreWriter.open(tmp_path, manifest())
    assert (tmp_path / "tmp" / elsewhere).exists()
    with writer.claim("shard-000000") as is_ours:
        assert not is_ours


def test_only_what_a_dead_process_of_this_host_left_is_swept(tmp_path: Path) -> None:
    StoreWriter.open(tmp_path, manifest())
    mine = new_scratch(tmp_path, "part.with.dots")
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", ".4194305."))  # above the largest process id
    elsewhere = dead.with_name("part.another-host.4194305.01234567")
    for path in (mine, dead, elsewhere):
        (path / "inner").mkdir(parents=True)
    dead.with_name("manifest.json" + dead.name.removeprefix("part.with.dots")).write_bytes(b"half")
    StoreWriter.open(tmp_path, manifest())
    assert {path.name for path in (tmp_path / "tmp").iterdir()} == {mine.name, elsewhere.name}
