"""`alignkd distill` of the small experiment in processes of its own, as a user or a launcher starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from command_lines import ROOT
from small_experiment import Experiment

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=localhost:0", "--shutdown-timeout=300"]


def accelerate(name: str) -> list[str]:
    """`accelerate launch` by a shipped config, of two processes: on CPUs, for the experiment has `train.use_cpu`."""
    file = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    options = [f"--config_file={file}", "--num_processes=2", "--main_process_port=0"]
    return ["-m", "accelerate.commands.launch", *options]


def distill(
    experiment: Experiment,
    output: Path,
    *overrides: str,
    launcher: Sequence[str] = (),
    program: str = "cli.py",
    name: Sequence[str] = ("distill",),
) -> subprocess.Popen[str]:
    """Started, without `evaluate`, in a process group of its own; `name` is that of the command."""
    command = [sys.executable, *launcher, str(ROOT / program), *name, "--config", str(experiment.file)]
    return subprocess.Popen(
        [*command, f"output_dir={output}", "evaluate=null", *overrides],
        cwd=output.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
