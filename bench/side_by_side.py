"""Contestants side by side: each in a process of its own, taking turns, so that what disturbs one disturbs all.

A script names its contestants; each is a function that prepares once and returns what to repeat. The parent starts
the script again for each of them, gives every one a turn to warm up, then turns about. A ratio is of two turns that
followed each other; its spread is over the repeats. Peak memory is a process's own: of the GPU where there is one,
else the resident set; `idle` is what it was before the first turn.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

Work = Callable[[], Mapping[str, float]]
"""One turn; returns what it counted, such as samples and bytes."""


@dataclass(frozen=True)
class Turns:
    """What the turns of a contestant took."""

    name: str
    seconds: tuple[float, ...]
    counted: Mapping[str, float]  # of the last turn
    idle_bytes: int
    peak_bytes: int

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def measure(script: str, names: Sequence[str], *, repeats: int, arguments: Sequence[str]) -> list[Turns]:
    """Every contestant's turns, one warm-up and `repeats` that count."""
    workers = {name: start(script, name, arguments) for name in names}
    try:
        idle = {name: answer(worker)["idle_bytes"] for name, worker in workers.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(repeats + 1):
            for name, worker in workers.items():
                print(f"turn {number}/{repeats}: {name}", file=sys.stderr, flush=True)
                ask(worker)
                answers[name].append(answer(worker))
    finally:
        for worker in workers.values():
            worker.kill()
    return [
        Turns(
            name,
            tuple(answer["seconds"] for answer in of_one[1:]),
            of_one[-1]["counted"],
            idle[name],
            of_one[-1]["peak_bytes"],
        )
        for name, of_one in answers.items()
    ]


def start(
    script: str, name: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """A contestant's process, which prepares itself and then answers once; `environment` is added to ours."""
    command = [sys.executable, script, *arguments, "--contestant", name]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | offline | (environment or {}),
    )


def ask(worker: subprocess.Popen[str]) -> None:
    """Give a contestant a turn; `answer` waits for its end."""
    assert worker.stdin is not None
    worker.stdin.write("turn\n")
    worker.stdin.flush()


def answer(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """What a contestant says next."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a contestant ended: {worker.args}")


def take_turns(work: Work) -> None:
    """A contestant's side: a line for every turn that is asked for on stdin."""
    print(json.dumps({"idle_bytes": peak_bytes(reset=True)}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        counted = work()
        _wait_for_device()
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "counted": counted, "peak_bytes": peak_bytes()}), flush=True)


def peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process held: allocated on the GPU, or resident. `reset` begins anew from here."""
    import torch

    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(turns: Sequence[Turns], *, against: str) -> str:
    """Seconds, ratios to one contestant, memory; a line each."""
    base = next(one for one in turns if one.name == against)
    width = max(len(one.name) for one in turns)
    lines = [f"{'':<{width}}  median s   min..max s      ratio  of turns      peak MB  above idle MB"]
    for one in turns:
        ratios = sorted(mine / theirs for mine, theirs in zip(one.seconds, base.seconds, strict=True))
        lines.append(
            f"{one.name:<{width}}  {one.median_seconds:8.3f}   {min(one.seconds):6.3f}..{max(one.seconds):<6.3f}  "
            f"{median(ratios):6.3f}  {ratios[0]:.3f}..{ratios[-1]:<6.3f}  {one.peak_bytes / 1e6:8.0f}  "
            f"{(one.peak_bytes - one.idle_bytes) / 1e6:8.0f}"
        )
    return "\n".join(lines)


def save(turns: Sequence[Turns], file: Path, **facts: Any) -> None:
    """All turns as JSON, with the machine that ran them."""
    record = {"machine": machine(), **facts, "contestants": [asdict(one) for one in turns]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> str:
    """The hardware, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
