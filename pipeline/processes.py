"""The processes that train one student together, as torchrun, `accelerate launch` or SLURM started them."""

from __future__ import annotations

import os


def num_processes() -> int:
    """How many processes there are, over all machines; 1 if none of the launchers is at work."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first_process() -> bool:
    """Whether this is the one process that prints results and writes files."""
    return int(os.environ.get("RANK") or 0) == 0
