"""Which tensors of a model do what, found by tracing it on the meta device: no names of a family, no weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.errors import ConfigError, building

TRACED = "alignkd_traced"  # without a mask function of this name transformers makes no mask, which needs real values


@dataclass(frozen=True)
class Anatomy:
    """Names of a model's parameters by what they are for.

    `attention[n]` are those that query and key of the n-th layer with attention depend on, layers before it included.
    `layers` are the prefixes of the decoder's layers, and `layer_of[n]` is the number of the n-th one with attention
    among them. `inputs[n]` are those that the input of the n-th layer of the decoder depends on; the last entry is
    what its final norm gets. `vision` is what text alone does not need: tower and projector, without what no forward
    reads.
    """

    embeddings: frozenset[str]
    attention: tuple[frozenset[str], ...]
    inputs: tuple[frozenset[str], ...]
    text: frozenset[str]
    vision: frozenset[str]
    layers: str
    layer_of: tuple[int, ...]

    def needed(self, deepest: int | None, hidden: int | None = None) -> list[str]:
        """Return the sorted names of what a teacher reads up to the n-th attention; -1: vision alone, None: all.

        With `hidden` also up to the input of that layer. Raises `ConfigError` if there is no such layer.
        """
        if hidden is not None and hidden >= len(self.inputs):
            raise ConfigError(
                f"targets.hidden_states.layer asks for what layer {hidden} gives, but the teacher's decoder has "
                f"{len(self.inputs) - 1} layers; ask for 0 (the embeddings) to {len(self.inputs) - 1}"
            )
        if deepest is None:
            return sorted(self.text | self.vision)
        of_attention = self.attention[deepest] if deepest >= 0 else frozenset[str]()
        of_hidden = frozenset[str]() if hidden is None else self.inputs[hidden]
        return sorted(self.vision | of_attention | of_hidden)

    def groups(self) -> dict[str, str]:
        """Return name -> `vision`, `embeddings`, `layer 0 attention`, `layer 0`, ..., `head`."""
        with_attention = {number: n for n, number in enumerate(self.layer_of)}
        found = {}
        for name in self.text | self.vision:
            found[name] = (
                "vision" if name in self.vision else "embeddings" if name in self.embeddings else "head"
            )
            if name in self.text and name.startswith(self.layers):
                number = int(name.removeprefix(self.layers).partition(".")[0])
                n = with_attention.get(number)
                is_tapped = n is not None and name in self.attention[n]
                found[name] = f"layer {number} attention" if is_tapped else f"layer {number}"
        return found


def empty_network(
    config: PreTrainedConfig, *, attention: str = "sdpa", dtype: torch.dtype | None = None
) -> Any:
    """Build the model of a config without weights: all its parameters are on the meta device.

    `dtype` also decides the values of some buffers, such as the scale of Gemma's embeddings; default: the config's.
    Raises `ConfigError` for a decoder that does not run on SDPA, as the tap does.
    """
    named = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        network = AutoModelForImageTextToText.from_config(config, **named)
    decoder = network.get_decoder()
    if not decoder._supports_sdpa:
        raise ConfigError(
            f"the family {config.model_type!r} was asked for with a text part of type {decoder.config.model_type!r}, "
            "whose attention does not run on SDPA; use a checkpoint with another text part"
        )
    decoder.set_attn_implementation({"": attention})
    return network


def _untraceable(network: Any) -> AbstractContextManager[None]:
    name = type(network).__name__
    return building(f"{name}: its layers cannot be run without weights", then="use another family")


def anatomy_of(config: PreTrainedConfig) -> Anatomy:
    """Trace a model of this config over two text tokens, and follow autograd's graph back to its parameters."""
    return _traced(type(config), config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _traced(kind: type[PreTrainedConfig], fields: str) -> Anatomy:
    network = empty_network(kind.from_dict(json.loads(fields)), attention=TRACED)
    decoder, head = network.get_decoder(), network.get_output_embeddings()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ConfigError(
            f"{type(network).__name__}: its decoder, {type(decoder).__name__}, has no list of layers; use another "
            "family"
        )
    with torch.enable_grad(), _tracing(decoder.layers) as (seen, inputs), _untraceable(network):
        embeds = network.get_input_embeddings()(torch.zeros(1, 2, dtype=torch.long, device="meta"))
        logits = head(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)
    every_name = dict(
        network.named_parameters(remove_duplicate=False)
    )  # a tied head has the name of the embeddings, too
    name_of = {id(parameter): name for name, parameter in network.named_parameters()}
    text = _leaves([logits], name_of)
    never = set(network.names_never_read()) if hasattr(network, "names_never_read") else set()
    buffers = network.state_dict().keys() - every_name.keys()
    [prefix] = [name for name, module in network.named_modules() if module is decoder.layers]
    return Anatomy(
        embeddings=frozenset(_leaves([embeds], name_of)),
        attention=tuple(frozenset(_leaves(of_one.inputs, name_of)) for of_one in seen),
        inputs=tuple(frozenset(_leaves([hidden], name_of)) for hidden in inputs),
        text=frozenset(text),
        vision=frozenset((set(name_of.values()) | buffers) - text - never),
        layers=f"{prefix}.",
        layer_of=tuple(of_one.layer for of_one in seen),
    )


@dataclass(frozen=True)
class _Seen:
    """A call of the attention function: the decoder layer that made it, and what its softmax is made of."""

    layer: int
    inputs: tuple[Tensor, Tensor]


_running: ContextVar[tuple[list[int], list[_Seen]]] = ContextVar("running")


@contextmanager
def _tracing(layers: nn.ModuleList) -> Iterator[tuple[list[_Seen], list[Tensor]]]:
    """Yield two lists that a forward in the context fills: calls of the attention function, and layers' inputs.

    The inputs end with the last layer's output.
    """
    begun: list[int] = []
    seen: list[_Seen] = []
    inputs: list[Tensor] = []

    def begin(number: int, args: Any, named: Any) -> None:
        begun.append(number)
        inputs.append(args[0] if args else named["hidden_states"])

    def end(_: nn.Module, args: Any, output: Any) -> None:
        inputs.append(output[0] if isinstance(output, tuple) else output)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, named, number=number: begin(number, args, named), with_kwargs=True
        )
    layers[-1].register_forward_hook(end)
    token = _running.set((begun, seen))
    try:
        yield seen, inputs
    finally:
        _running.reset(token)


def _traced_attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    begun, seen = _running.get()
    seen.append(_Seen(begun[-1], (query, key)))
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


AttentionInterface.register(TRACED, _traced_attention)


def _leaves(outputs: Iterable[Tensor], name_of: Mapping[int, str]) -> set[str]:
    """Return the names of the parameters that the outputs depend on."""
    todo: list[Any] = [output.grad_fn for output in outputs]
    found, known = set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if (variable := getattr(node, "variable", None)) is not None:  # of an AccumulateGrad node
            found.add(name_of[id(variable)])
        todo += [following for following, _ in node.next_functions]
    return found
