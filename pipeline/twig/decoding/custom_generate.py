"""Decoding with a twig by transformers' own `generate`, and by one function that also returns what it did."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as scores_of
from transformers.generation import stopping_criteria as stops

from pipeline.errors import ConfigError
from pipeline.models.configuration import image_token_of
from pipeline.twig.base import Base
from pipeline.twig.decoding.choosing import Choice, Greedy, Sampling
from pipeline.twig.decoding.faster import TreeIfFaster
from pipeline.twig.decoding.generate import Answers, Decoding, answer, answers_as_tensor
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.module import Twig

# What changes scores by the scores alone. Others look at the text so far, which differs from draft to draft.
WARPS = (
    scores_of.TemperatureLogitsWarper,
    scores_of.TopKLogitsWarper,
    scores_of.TopPLogitsWarper,
    scores_of.MinPLogitsWarper,
    scores_of.TypicalLogitsWarper,
    scores_of.EpsilonLogitsWarper,
    scores_of.EtaLogitsWarper,
    scores_of.SuppressTokensLogitsProcessor,
)
# What `Decoding` itself sees to.
STOPS = (stops.MaxLengthCriteria, stops.EosTokenCriteria)


@dataclass(frozen=True)
class TwigGenerate:
    """A decoding method for `model.generate(**inputs, custom_generate=TwigGenerate(twig, keep=1 / 9))`.

    See `Decoding` for the settings. Greedy decoding returns the tokens that the base, pruned alike, writes without
    drafts; sampling has their distribution. Raises `ConfigError` for settings of `generate` that it cannot honour.
    """

    twig: Twig
    keep: float | None = None
    delta: int | Literal["auto"] = 5
    threshold: float = 0.6
    look_up: int = 0
    tree: Tree | TreeIfFaster | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Return prompts and new tokens, int64 'B S', padded on the right; transformers' signature."""
        _refuse_others(generation_config, stopping_criteria, inputs)
        stop_ids = _stop_ids(generation_config)
        decoding = self._decoding(
            generation_config.max_length - input_ids.shape[1],
            stop_ids,
            _choice(logits_processor, is_sampled=bool(generation_config.do_sample)),
        )
        asked = {name: value for name, value in inputs.items() if name not in ("streamer", "synced_gpus")}
        answers = _answer(model, self.twig, {"input_ids": input_ids, **asked}, decoding)
        pad_id = _pad_id(generation_config)
        return torch.cat([input_ids, answers_as_tensor(answers, pad_id=pad_id).to(input_ids)], dim=1)

    def _decoding(self, max_new_tokens: int, stop_ids: frozenset[int], choice: Choice) -> Decoding:
        return Decoding(
            max_new_tokens, stop_ids, self.keep, self.delta, self.threshold, self.look_up, choice, self.tree
        )


def generate_with_twig(
    model: Any,
    twig: Twig | None,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    choice: Choice | None = None,
    **settings: Any,
) -> Answers:
    """Answer prompts, what a processor returns of them, and return the new tokens and what the drafts came to.

    An answer ends at one of `stop_ids`; None: at the end tokens of the model's `generation_config`. `settings` are
    those of `TwigGenerate`. Without a twig the base answers alone, by the same code.
    """
    stops_at = _stop_ids(model.generation_config) if stop_ids is None else frozenset(stop_ids)
    decoding = Decoding(max_new_tokens, stops_at, choice=choice or Greedy(), **settings)
    return _answer(model, twig, inputs, decoding)


def _answer(model: Any, twig: Twig | None, inputs: Mapping[str, Any], decoding: Decoding) -> Answers:
    prompts = Prompts.of(inputs, image_token_id=image_token_of(model.config))
    return answer(Base.of(model), twig, prompts, decoding)


def _choice(processors: Sequence[Any], *, is_sampled: bool) -> Choice:
    if strange := [type(one).__name__ for one in processors if not isinstance(one, WARPS)]:
        raise ConfigError(
            f"generate asks for {strange[0]}, which a twig cannot do: it changes scores by the scores alone, by "
            "temperature, top_k, top_p, min_p, typical_p, epsilon, eta and suppressed tokens; leave it out"
        )
    warp = _warp(processors)
    return Sampling(warp) if is_sampled else Greedy(warp)


def _warp(processors: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    def warp(scores: Tensor) -> Tensor:
        flat = scores.reshape(-1, scores.shape[-1])
        for processor in processors:
            flat = processor(None, flat)
        return flat.view(scores.shape)

    return warp


def _stop_ids(settings: GenerationConfig) -> frozenset[int]:
    stop = settings.eos_token_id
    return frozenset() if stop is None else frozenset([stop] if isinstance(stop, int) else stop)


def _pad_id(settings: GenerationConfig) -> int:
    """Return the id of padding: as in transformers the first end token, where none is named."""
    if isinstance(settings.pad_token_id, int):
        return settings.pad_token_id
    stop = settings.eos_token_id
    return 0 if stop is None else stop if isinstance(stop, int) else stop[0]


def _refuse_others(settings: GenerationConfig, criteria: Sequence[Any], inputs: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what is asked of `generate` and would be left undone in silence."""
    asked = {
        "num_beams": (settings.num_beams or 1) > 1,
        "penalty_alpha": settings.penalty_alpha is not None,
        "dola_layers": settings.dola_layers is not None,
        "return_dict_in_generate": bool(settings.return_dict_in_generate),
        "streamer": inputs.get("streamer") is not None,
        **{type(one).__name__: True for one in criteria if not isinstance(one, STOPS)},
    }
    if strange := [name for name, is_asked in asked.items() if is_asked]:
        raise ConfigError(
            f"generate asks for {strange[0]}, which decoding with a twig does not do; leave it out, or leave "
            "custom_generate out"
        )
