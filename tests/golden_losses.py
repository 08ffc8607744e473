"""Both stages of the demo on its first 512 questions, one thread: every term of the first steps, to the last bit.

python tests/golden_losses.py                                      prints them
python tests/golden_losses.py > tests/golden/demo_first_steps.json  when a change of the numbers is meant
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NUM_QUESTIONS = 512
NUM_STEPS = 6

# The plain instruction set that every x86-64 processor has, and one thread: nothing is left to the machine.
SAME_EVERYWHERE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
PACKAGES = ("numpy", "pillow", "torch", "transformers")


def measure() -> dict[str, Any]:
    """Versions, and of each step its terms as hexadecimal floats; in a process of its own."""
    command = [sys.executable, __file__, "--here"]
    environment = os.environ | SAME_EVERYWHERE | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def first_steps(folder: Path) -> list[dict[str, str]]:
    """Pack, cache and train in an empty folder, with the shipped config."""
    from pipeline.config.config import load_config
    from pipeline.distill.student import train_student
    from pipeline.packing.pack import pack
    from pipeline.studies import demo
    from pipeline.teacher_cache.teacher import cache_teacher

    records = demo.conversations("train")[:NUM_QUESTIONS]
    (folder / "train.json").write_text(json.dumps(records))
    pack(folder / "train.json", folder / "shards", image_folder=demo.easy_vqa_folder(), samples_per_shard=256)
    demo.student(seed=0, folder=folder / "student")
    overrides = {
        "output_dir": folder / "run",
        "student.model": folder / "student",
        "data.shards": folder / "shards",
        "cache.path": folder / "teacher.zarr",
        "evaluate": "null",
        "train.max_steps": NUM_STEPS,
        "train.logging_steps": 1,
        "train.report_to": "none",
        "train.use_cpu": "true",
    }
    config = load_config(ROOT / "configs/demo.yaml", [f"{key}={value}" for key, value in overrides.items()])
    cache_teacher(config)
    train_student(config, folder / "run")
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return [
        {name: float(value).hex() for name, value in entry.items() if name.startswith("loss/")}
        for entry in history
        if "loss/supervised" in entry
    ]


def _here() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        steps = first_steps(Path(folder))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"versions": versions | {"machine": platform.machine()}, "steps": steps}


if __name__ == "__main__":
    result = _here() if "--here" in sys.argv else measure()
    print(json.dumps(result, indent=1))
