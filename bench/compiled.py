"""What `torch.compile` would save of the teacher's decoder, whose batches all have another length.

python -m bench.compiled --size small --layers 8
python -m bench.compiled --size wide --layers 2      (full widths in bfloat16)

Batches of 4. The lengths of the first turn make it compile for any length; the seconds of that are printed apart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from itertools import count

import torch
import typer
from transformers import LlamaConfig, LlamaModel

from bench.models import MODELS, VOCABULARY, Size, compute_dtype
from bench.turns import Work, measure, print_turns

FIRST_LENGTH, LONGER = 300, 7
app = typer.Typer(add_completion=False)


def decoder(size: Size, layers: int, *, is_compiled: bool) -> Work:
    """A forward of the teacher's language model with random weights; every turn's batch is longer."""
    settings = MODELS[size, "teacher"] | {"num_hidden_layers": layers, "vocab_size": VOCABULARY}
    model = LlamaModel(LlamaConfig(**settings)).to(getattr(torch, compute_dtype(size))).eval()
    model = model.cuda() if torch.cuda.is_available() else model
    run, lengths = torch.compile(model, dynamic=True) if is_compiled else model, count(FIRST_LENGTH, LONGER)

    @torch.no_grad()
    def turn() -> Mapping[str, float]:
        length = next(lengths)
        embeds = torch.randn(4, length, model.config.hidden_size, dtype=model.dtype, device=model.device)
        mask = torch.ones(4, length, dtype=torch.long, device=model.device)
        mask[0, -20:] = 0
        run(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        return {}

    started = time.perf_counter()
    turn()
    turn()
    print(
        f"{'compiled' if is_compiled else 'eager'}: {time.perf_counter() - started:.0f} s of two first turns"
    )
    return turn


@app.command(help=__doc__.splitlines()[0])
def main(size: Size = "small", layers: int = 8, repeats: int = 6) -> None:
    ways = {"eager": False, "compiled": True}
    contestants = {name: partial(decoder, size, layers, is_compiled=of) for name, of in ways.items()}
    print_turns(measure(contestants, repeats), against="eager")


if __name__ == "__main__":
    app()
