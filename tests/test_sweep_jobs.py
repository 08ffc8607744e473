"""Jobs side by side: a killed one stops no other, an interrupted sweep leaves none behind, GPUs are those visible."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.sweep.jobs import Failed, Job, device_of, run_jobs, threads_for

pytestmark = pytest.mark.slow


def double(number: int) -> int:
    print("doubling")
    return 2 * number


def kill_itself(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def complain(number: int) -> int:
    raise PipelineError(f"{number} is no good; take another")


def stumble(number: int) -> int:
    raise AttributeError(f"{number} has no such thing")


def write_and_sleep(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(60)


def test_a_job_that_is_killed_or_complains_stops_no_other(tmp_path):
    work = [double, kill_itself, complain, double, stumble]
    jobs = [Job(str(n), function, (n,), tmp_path / str(n)) for n, function in enumerate(work)]
    results = {job.name: result for job, result in run_jobs(jobs, at_once=2)}
    assert (results["0"], results["3"]) == (0, 6)
    killed, refused = results["1"], results["2"]
    assert isinstance(killed, Failed)
    assert "ended with exit code -9 (-9: killed, perhaps out of memory" in killed.reason
    assert isinstance(refused, Failed) and refused.reason == "PipelineError: 2 is no good; take another"
    assert results["4"] == Failed("AttributeError: 4 has no such thing")
    assert "in stumble" in (tmp_path / "4" / "log.txt").read_text()
    assert (tmp_path / "3" / "log.txt").read_text() == "doubling\n"


def test_jobs_that_nobody_waits_for_any_more_are_ended(tmp_path):
    files = [tmp_path / "first", tmp_path / "second"]
    jobs = [Job("quick", double, (1,), tmp_path / "quick")]
    jobs += [Job(file.name, write_and_sleep, (file,), tmp_path / f"of_{file.name}") for file in files]
    results = run_jobs(jobs, at_once=3)
    next(results)
    while not all(file.is_file() and file.read_text() for file in files):
        time.sleep(0.05)
    results.close()
    assert all(is_gone(int(file.read_text())) for file in files)


def test_a_sweep_that_is_killed_leaves_no_job_behind(tmp_path):
    code = (
        "import sys; from pathlib import Path; from test_sweep_jobs import *\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    list(run_jobs([Job('a', write_and_sleep, (folder / 'pid',), folder)], at_once=1))\n"
    )
    script = tmp_path / "sweep.py"
    script.write_text(code)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    sweep = subprocess.Popen([sys.executable, script], env=environment)
    pid = tmp_path / "pid"
    while not (pid.is_file() and pid.read_text()):
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    assert is_gone(int(pid.read_text()))


def is_gone(pid: int) -> bool:
    """Within ten seconds; one that nobody has waited for yet is gone too."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in ("Z", "X"):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("visible", "count", "devices"),
    [(None, 0, [None, None]), (None, 2, ["0", "1", "0"]), ("2,3", 2, ["2", "3", "2"]), ("", 0, [None])],
)
def test_a_place_has_one_of_the_visible_gpus(monkeypatch, visible, count, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device_of(place) for place in range(len(devices))] == devices


def test_cores_are_shared_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (threads_for(2), threads_for(5), threads_for(99)) == (8, 3, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_for(2) is None
