"""What `torch.compile` would save of the teacher's decoder, whose batches all have another length.

python bench/compiled.py --size small --layers 8
python bench/compiled.py --size wide --layers 2      (full widths in bfloat16)

Eager and compiled take turns in one process, on batches of 4 whose length changes every turn; compiling is not timed
with them, and told by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from random_models import MODELS, VOCABULARY, compute_dtype

BATCH, FIRST_LENGTH, LONGER = 4, 300, 7


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["small", "wide", "full"], default="small")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    eager = _decoder(options.size, options.layers)
    compiled = torch.compile(eager, dynamic=True)
    started = time.perf_counter()
    for turn in (0, 1):  # the second length makes it compile for any
        _seconds(compiled, eager, turn)
    print(f"compiling took {time.perf_counter() - started:.0f} s")
    _seconds(eager, eager, 0)
    turns = [(_seconds(eager, eager, n), _seconds(compiled, eager, n)) for n in range(2, 2 + options.repeats)]
    ratios = [mine / theirs for theirs, mine in turns]
    print(f"eager {median(t for t, _ in turns):.3f} s, compiled {median(t for _, t in turns):.3f} s")
    print(f"compiled / eager {median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})")
    return 0


def _decoder(size: str, layers: int) -> LlamaModel:
    """The teacher's language model with random weights."""
    settings = {name: value for name, value in MODELS[size, "teacher"].items() if name != "vision_config"}
    config = LlamaConfig(**settings | {"num_hidden_layers": layers, "vocab_size": VOCABULARY})
    model = LlamaModel(config).to(getattr(torch, compute_dtype(size))).eval()
    return model.cuda() if torch.cuda.is_available() else model


@torch.no_grad()
def _seconds(run: Callable[..., object], model: LlamaModel, turn: int) -> float:
    """Of one forward, the first sample of its batch padded."""
    length = FIRST_LENGTH + LONGER * turn
    embeds = torch.randn(BATCH, length, model.config.hidden_size, dtype=model.dtype, device=model.device)
    mask = torch.ones(BATCH, length, dtype=torch.long, device=model.device)
    mask[0, -20:] = 0
    started = time.perf_counter()
    run(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
