"""What loading a stub reads and holds, from a `.bin` and from a safetensors checkpoint.

python -m bench.stub_load
python -m bench.stub_load --checkpoint FOLDER     (a checkpoint of MobileVLM V2, whatever its size)

A checkpoint of about 0.4 GB with random weights is hashed and dropped from the system's cache. Then a new process
loads the stub for attention of layer 0 and vision, in the checkpoint's own dtype, and touches every page of it: what
is mapped is read when it is used. `read` is what came from the disk, `resident` how much the process grew.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import typer
from safetensors.torch import load_file

from bench.models import write_model
from bench.processes import counters
from bench.tables import print_table
from bench.turns import own_process
from cache import drop_from_memory
from pipeline.models.anatomy import empty_network
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import TeacherPlan, plan_teacher
from pipeline.targets.targets import TARGETS

MODEL = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16,
         "vision_config": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
                           "num_attention_heads": 4}}  # fmt: skip
app = typer.Typer(add_completion=False)


def row_of(checkpoint: Path) -> dict[str, str]:
    """Load the stub in a process of its own."""
    targets = {name: TARGETS[name]() for name in ("attention", "vision")}
    plan = plan_teacher(str(checkpoint), targets=targets)
    drop_from_memory(checkpoint)
    with own_process() as process:
        needed, read, resident = process.submit(_load, plan).result()
    whole = sum(file.stat().st_size for file in checkpoint.iterdir())
    sizes = {"checkpoint": whole, "needed": needed, "read": read, "resident": resident}
    return {
        "": checkpoint.name,
        **{name: f"{size / 1e6:.0f} MB" for name, size in sizes.items()},
        "read/needed": f"{read / needed:.2f}",
        "resident/needed": f"{resident / needed:.2f}",
    }


def _load(plan: TeacherPlan) -> tuple[int, int, int]:
    """Bytes of the stub's tensors, bytes that the disk gave, and bytes that the process grew by."""
    empty_network(plan.config)  # imports what models are made of
    read, resident = counters("io")["read_bytes"], counters("status")["VmRSS"]
    dtype = plan.config.dtype if isinstance(plan.config.dtype, torch.dtype) else torch.float16
    teacher = load_teacher(plan, dtype=dtype, device=torch.device("cpu"))
    tensors = [tensor for tensor in teacher.vlm.network.state_dict().values() if not tensor.is_meta]
    for tensor in tensors:
        tensor.flatten()[::512].sum()  # more than one value a page
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return needed, counters("io")["read_bytes"] - read, counters("status")["VmRSS"] - resident


def write_both(folder: Path) -> list[Path]:
    """Write one model in both formats."""
    write_model(folder / "safetensors", MODEL, "float16")
    write_model(folder / "bin", MODEL, "float16")
    [file] = (folder / "bin").glob("*.safetensors")
    torch.save(load_file(file), folder / "bin" / "pytorch_model.bin")
    file.unlink()
    return [folder / "safetensors", folder / "bin"]


@app.command(help=__doc__.splitlines()[0])
def main(checkpoint: Path | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # what lies in memory alone is never read
        print_table([row_of(one) for one in ([checkpoint] if checkpoint else write_both(Path(folder)))])


if __name__ == "__main__":
    app()
