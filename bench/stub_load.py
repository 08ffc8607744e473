"""What loading a stub reads and holds, from a `.bin` and from a safetensors checkpoint.

python bench/stub_load.py
python bench/stub_load.py --checkpoint FOLDER     (one that is there, whatever its size)

A checkpoint of about 0.4 GB with random weights, its file dropped from the system's cache; a process of its own loads
the stub for attention of layer 0 and vision, and touches every page of it: what is mapped is read when it is used.
`read` is what came from the disk, `resident` how much the process grew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from cache import drop_from_memory

LANGUAGE_MODEL = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16,
                  "num_key_value_heads": 16}  # fmt: skip
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/stub_load.json"))
    parser.add_argument("--checkpoint", type=Path, help="a folder, in place of what would be made")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(_load(options.load)))
        return 0
    if options.checkpoint:
        rows = [_row(options.checkpoint.name, options.checkpoint)]
    else:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            rows = [_row(kind, _write(Path(folder) / kind, kind)) for kind in ("safetensors", "bin")]
    print(f"{'':<12} checkpoint  needed     read  resident  read/needed  resident/needed")
    for row in rows:
        needed, read, resident = row["needed_bytes"], row["read_bytes"], row["resident_bytes"]
        print(
            f"{row['kind']:<12} {row['checkpoint_bytes'] / 1e6:7.0f} MB  {needed / 1e6:3.0f} MB  "
            f"{read / 1e6:4.0f} MB  "
            f"{resident / 1e6:5.0f} MB  {read / needed:11.2f}  {resident / needed:15.2f}"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _row(name: str, checkpoint: Path) -> dict[str, Any]:
    return {"kind": name, "checkpoint_bytes": _size(checkpoint)} | _measured(checkpoint)


def _write(folder: Path, kind: str) -> Path:
    """float16, in the published layout."""
    import torch
    from random_models import IMAGE_SIZE, PATCH_SIZE, VOCABULARY

    from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM

    config = MobileVLMConfig(**LANGUAGE_MODEL, vocab_size=VOCABULARY, mm_projector_grid=12, vision_config={
        **TOWER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 64})  # fmt: skip
    model = MobileVLMForCausalLM(config).half()
    model.save_pretrained(folder)
    if kind == "bin":
        from safetensors.torch import load_file

        [file] = folder.glob("*.safetensors")
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    return folder


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _measured(checkpoint: Path) -> dict[str, Any]:
    drop_from_memory(checkpoint)
    command = [sys.executable, __file__, "--load", str(checkpoint)]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def _load(checkpoint: str) -> dict[str, int]:
    """Loaded on the CPU, in the checkpoint's own dtype: nothing is converted."""
    import torch

    from pipeline.models.checkpoint import Checkpoint
    from pipeline.models.configuration import read_config
    from pipeline.models.stub import load_teacher
    from pipeline.models.teacher_plan import TeacherPlan, needed_tensors, teacher_facts
    from pipeline.targets.targets import TARGETS, deepest_layer

    targets = {name: TARGETS[name].settings() for name in ("attention", "vision")}
    found, config = Checkpoint(checkpoint), read_config(Path(checkpoint))
    deepest = deepest_layer(targets)
    names = needed_tensors(config, deepest=deepest)
    # Not `plan_teacher`, which also hashes: what is hashed is read.
    plan = TeacherPlan(
        found, config, teacher_facts(checkpoint, config), targets, deepest, tuple(names), "", {}
    )
    torch.empty(1)
    before, read_before = _resident(), _read()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
    teacher = load_teacher(plan, dtype=dtype, device=torch.device("cpu"))
    held = [tensor for tensor in teacher.model.state_dict().values() if tensor.device.type != "meta"]
    for tensor in held:
        tensor.flatten()[::512].sum()  # more than one value a page
    after, read_after = _resident(), _read()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return {"needed_bytes": needed, "read_bytes": read_after - read_before, "resident_bytes": after - before}


def _resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _read() -> int:
    """Bytes that the process had read from the disk, by calls or by touching a mapped file."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


if __name__ == "__main__":
    sys.exit(main())
