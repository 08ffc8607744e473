"""Decoding with a twig against the same base without one, in full shapes with random weights, side by side.

python -m bench.twig --size small                 (two CPU cores, a minute)
python -m bench.twig --size 1.7b-144              (a GPU with 8 GB, or half an hour on two CPU cores)
python -m bench.twig --size 7b-144 --size 7b-576  (a GPU with 24 GB)

The layers behind the twig add little (`--damping`), so that a copied twig's drafts are accepted now and then, as a
trained one's are: `acceptance` says how often. The weights mean nothing, the shapes and kernels do: what a trained
twig gains is its own acceptance put into these times. One process holds all weights once; the ways take turns, the
first turn of each warms up, and a ratio is of two turns of one round. The vision tower is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.models import VOCABULARY
from bench.tables import print_table
from pipeline.models.image_features import EncoderOutput
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.twig.base import Base
from pipeline.twig.decoding.faster import TreeIfFaster
from pipeline.twig.decoding.generate import Answers, Decoding, answer
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

TEXT = 60  # tokens of a question with its template
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_TREE = Tree(children=3, expanded=3, nodes=12)  # for devices on which a pass over 60 nodes is dear
Way = Callable[[], Answers]


@dataclass(frozen=True)
class Shape:
    """A language model's sizes, the side of its grid of vision tokens, and the paper's place of a twig on it."""

    width: int
    inner: int
    layers: int
    heads: int
    grid: int
    wipe: int


SHAPES = {
    "tiny": Shape(64, 96, 10, 4, grid=4, wipe=8),  # for a test
    "small": Shape(256, 688, 24, 8, grid=9, wipe=18),
    "1.7b-144": Shape(2048, 5632, 24, 16, grid=12, wipe=18),
    "7b-144": Shape(4096, 11008, 32, 32, grid=12, wipe=24),
    "7b-576": Shape(4096, 11008, 32, 32, grid=24, wipe=24),
}


def main(
    size: Annotated[list[str], typer.Option(help=f"one or several of {', '.join(SHAPES)}")] = ["small"],  # noqa: B006
    new_tokens: int = 64,
    repeats: int = 5,
    batch: Annotated[int, typer.Option(help="prompts answered together")] = 1,
    damping: Annotated[float, typer.Option(help="factor of what the layers behind the twig add")] = 0.1,
    delta: int = 5,
    threshold: float = 0.0,
    keep: Annotated[float, typer.Option(help="share of vision tokens kept on average")] = 1 / 9,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{where} of {os.cpu_count()} CPU cores, torch {torch.__version__}, {new_tokens} new tokens, batch {batch}"
    )
    for name in size:
        base, twig, prompts = build(SHAPES[name], device=device, batch=batch, damping=damping)
        drafts = {"delta": delta, "threshold": threshold}
        decodings = {
            "base": Decoding(new_tokens, delta=0),
            "base, pruned": Decoding(new_tokens, keep=keep, delta=0),
            "twig": Decoding(new_tokens, **drafts),
            "twig, pruned": Decoding(new_tokens, keep=keep, **drafts),
            **{
                f"twig, tree of {tree.nodes}": Decoding(new_tokens, tree=tree)
                for tree in (Tree(), SMALL_TREE)
            },
            "twig, tree if faster": Decoding(new_tokens, tree=TreeIfFaster(), **drafts),
        }
        ways: dict[str, Way] = {
            way: partial(
                answer, base, twig if decoding.has_drafts or decoding.keep else None, prompts, decoding
            )
            for way, decoding in decodings.items()
        }
        short = Twig(twig.geometry, twig.layers, twig.norm, twig.head)
        short.shorten(_frequent(ways["base"]().tokens, device))
        ways["twig, short head"] = partial(answer, base, short, prompts, decodings["twig"])
        ways["transformers"] = partial(_by_transformers, base, prompts, new_tokens)
        _print(name, _turns(ways, repeats), new_tokens * batch)


def build(shape: Shape, *, device: str, batch: int, damping: float) -> tuple[Base, Twig, Prompts]:
    """Return a base with random weights, a twig copied from it, and prompts with random vision features."""
    config = MobileVLMConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=VOCABULARY, pad_token_id=0,
        mm_projector_grid=shape.grid, max_position_embeddings=4096,
        vision_config=TOWER | {"image_size": 14 * shape.grid, "patch_size": 14},
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            network = MobileVLMForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    geometry = Geometry(2, 3, shape.wipe, shape.layers)
    damped: Any = network.model.layers[geometry.attach_layer + geometry.num_layers :]
    for layer in damped:
        layer.self_attn.o_proj.weight *= damping
        layer.mlp.down_proj.weight *= damping
    twig = Twig.copied(network, geometry).eval().requires_grad_(False)
    return Base.of(network), twig, _prompts(network, shape, batch)


def _prompts(network: Any, shape: Shape, batch: int) -> Prompts:
    num_vision = shape.grid**2
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (batch, num_vision + TEXT), generator=generator)
    ids[:, 10 : 10 + num_vision] = network.config.image_token_id
    # As large as an embedding, so that neither vision nor text drowns in the other.
    features = torch.randn(batch * num_vision, shape.width, generator=generator) * 0.02
    image = EncoderOutput(pooler_output=features.to(network.device, network.dtype))
    inputs = {"input_ids": ids.to(network.device), "mm_encoder_outputs": {"image": image}}
    return Prompts.of(inputs, image_token_id=network.config.image_token_id)


def _frequent(answers: Sequence[Sequence[int]], device: str) -> Tensor:
    """Return an eighth of the vocabulary, with the base's own tokens: what a short head is at best."""
    own = sorted({token for tokens in answers for token in tokens})
    others = [token for token in range(VOCABULARY) if token not in set(own)]
    return torch.tensor(sorted(own + others[: VOCABULARY // 8 - len(own)]), device=device)


@torch.inference_mode()
def _by_transformers(base: Base, prompts: Prompts, new_tokens: int) -> Answers:
    made: Tensor = base.network.generate(
        **prompts.inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    answers = Answers.begun(len(made))
    answers.tokens = made[:, prompts.length :].tolist()
    return answers


def _turns(ways: Mapping[str, Way], repeats: int) -> dict[str, list[tuple[float, Answers]]]:
    turns: dict[str, list[tuple[float, Answers]]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            answers = way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turns[name].append((time.perf_counter() - started, answers))
    return {name: of_one[1:] for name, of_one in turns.items()}


def _print(size: str, turns: Mapping[str, Sequence[tuple[float, Answers]]], num_tokens: int) -> None:
    print(f"\n{size}")
    base = [seconds for seconds, _ in turns["base"]]
    rows = []
    for name, of_one in turns.items():
        ratios = [theirs / mine for (mine, _), theirs in zip(of_one, base, strict=True)]
        last = of_one[-1][1]
        drafted, passes = sum(last.drafted), sum(last.passes)
        rows.append({
            "": name,
            "ms a token": f"{1000 * median(seconds for seconds, _ in of_one) / num_tokens:.2f}",
            "times as fast": f"{median(ratios):.2f}",
            "of turns": f"{min(ratios):.2f}..{max(ratios):.2f}",
            "acceptance": f"{sum(last.accepted) / drafted:.2f}" if drafted else "",
            "tokens a pass": f"{num_tokens / passes:.2f}" if passes else "",
            "same text": str(last.tokens == turns["base"][-1][1].tokens),
        })  # fmt: skip
    print_table(rows)


if __name__ == "__main__":
    typer.run(main)
