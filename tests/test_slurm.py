"""The SLURM scripts: bash reads them, their commands parse, and a job that is stopped is put in the queue again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_lines import ROOT, check_line

pytestmark = pytest.mark.slow

SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
VARIABLES = {
    "CONFIG": "configs/demo.yaml",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "machine[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_both_stages_have_a_script():
    assert [script.stem for script in SCRIPTS] == ["distill", "teacher_cache"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_bash_reads_it_and_every_command_in_it_would_be_understood(script: Path):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = re.sub(r"\$\{?(\w+)\}?", lambda found: VARIABLES.get(found[1], ""), script.read_text())
    lines = [line.removesuffix("&").strip() for line in text.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if re.match(r"alignkd |srun .*cli\.py", line)]
    assert len(commands) == 1
    check_line(commands[0])


# Stand-ins for SLURM and for the work: the work ends by SIGTERM with an exit code, unless it is done before.
WORK = """#!/bin/bash
echo $$ > work.pid
trap 'exit {on_sigterm}' TERM
for _ in $(seq {seconds}0); do sleep 0.1; done
exit {at_the_end}
"""
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && echo machine1\necho "scontrol $*" >> said\n'


def submitted(script: Path, folder: Path, **work: int) -> subprocess.Popen[str]:
    programs = {
        "alignkd": WORK.format(**work),
        "srun": WORK.format(**work),
        "scontrol": SCONTROL,
        "scancel": '#!/bin/bash\nkill -TERM "$(cat work.pid)"\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, **VARIABLES, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(script), "configs/demo.yaml"], cwd=folder, env=environment, text=True
    )


def requeued(folder: Path) -> list[str]:
    said = (folder / "said").read_text().splitlines() if (folder / "said").exists() else []
    return [line for line in said if "requeue" in line]


@pytest.mark.parametrize(("name", "job"), [("distill", "7"), ("teacher_cache", "7_3")])
def test_a_job_that_is_told_to_stop_waits_for_its_work_and_is_queued_again(name, job, tmp_path):
    process = submitted(
        ROOT / "examples/slurm" / f"{name}.sbatch", tmp_path, on_sigterm=1, seconds=60, at_the_end=0
    )
    while not (tmp_path / "work.pid").exists() or not (tmp_path / "work.pid").read_text().strip():
        time.sleep(0.01)
    time.sleep(0.2)  # until its trap is set
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert requeued(tmp_path) == [f"scontrol requeue {job}"]


@pytest.mark.parametrize("name", ["distill", "teacher_cache"])
@pytest.mark.parametrize("code", [0, 2])
def test_a_job_that_ends_by_itself_says_how(name, code, tmp_path):
    script = ROOT / "examples/slurm" / f"{name}.sbatch"
    assert submitted(script, tmp_path, on_sigterm=1, seconds=0, at_the_end=code).wait(timeout=30) == code
    assert requeued(tmp_path) == []


def test_the_work_that_ends_well_though_it_was_told_to_stop_is_done(tmp_path):
    script = ROOT / "examples/slurm/distill.sbatch"
    process = submitted(script, tmp_path, on_sigterm=0, seconds=60, at_the_end=0)
    while not (tmp_path / "work.pid").exists() or not (tmp_path / "work.pid").read_text().strip():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert requeued(tmp_path) == []
