"""TARGETS: what is kept of a teacher. A row says which arrays a target fills, from what, and how they come back.

Stage 1 calls `arrays` once and `capture` on every batch; stage 2 calls `collate` on what the store returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from cache import ArraySpec
from pipeline.errors import ConfigError
from pipeline.positions import Slots
from pipeline.settings import PowerOfTwo, Section
from pipeline.targets.tail_draws import draw_tail
from pipeline.targets.vocabulary import SMALLEST_LOG_PROBABILITY, with_tail

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TeacherFacts:
    """What stage 2 must know of a teacher whose weights it never opens; the manifest carries it."""

    name: str
    num_layers: int
    num_heads: int
    hidden_size: int
    num_vision_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class TeacherForward:
    """What one batch through the teacher leaves, as far as the targets asked for it.

    `attention` layer -> float32 'B H T J'; `answer_logits` 'A V', all samples in order; `num_answers` P of
    every sample; `slots`; `num_vision_tokens` N of an image; `keys` of the samples, which draws depend on.
    """

    slots: Slots
    attention: Mapping[int, Tensor]
    answer_logits: Tensor | None
    num_answers: Sequence[int]
    num_vision_tokens: int
    keys: Sequence[str] = ()


Source = Literal["cache", "recompute"]

ATTENTION_STEP = 2**-12


class AttentionTarget(Section):
    """Text-to-vision attention of the teacher's layers: `heads: each`, or their `mean`; `step` is `fixed_point`'s."""

    source: Source = "cache"
    layers: list[int] = Field(default=[0], min_length=1)
    heads: Literal["each", "mean"] = "mean"
    codec: Literal["sqrt_uint8", "fixed_point", "float16", "float32"] = "sqrt_uint8"
    step: PowerOfTwo = Field(default=ATTENTION_STEP, exclude_if=lambda step: step == ATTENTION_STEP)

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: list[int]) -> list[int]:
        if layers != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"layers must ascend from 0 on, without repeats; found {layers}")
        return layers


def _attention_arrays(settings: AttentionTarget, facts: TeacherFacts) -> list[ArraySpec]:
    if settings.layers[-1] >= facts.num_layers:
        raise ConfigError(
            f"targets.attention.layers asks for layer {settings.layers[-1]}, "
            f"but the teacher has layers 0 to {facts.num_layers - 1}; ask for one of these"
        )
    shape = (1 if settings.heads == "mean" else facts.num_heads, facts.num_vision_tokens)
    return [
        ArraySpec(_layer_name(layer), "R H N", shape, "sample", settings.codec, _options(settings))
        for layer in settings.layers
    ]


def _options(settings: AttentionTarget | VisionTarget) -> dict[str, float]:
    return {"step": settings.step} if settings.codec == "fixed_point" else {}


def _layer_name(layer: int) -> str:
    return f"attention/layer_{layer}"


def _capture_attention(settings: AttentionTarget, forward: TeacherForward) -> list[Arrays]:
    """Per sample and layer float32 'R H N', R = images x text rows, image after image."""
    rows, columns = ((slots >= 0).sum(dim=1).tolist() for slots in (forward.slots.text, forward.slots.vision))
    samples: list[Arrays] = [{} for _ in rows]
    for layer in settings.layers:
        attention = forward.attention[layer]
        if settings.heads == "mean":
            attention = attention.mean(dim=1, keepdim=True)
        num_vision_tokens = forward.num_vision_tokens
        for sample, block, num_rows, num_columns in zip(samples, attention, rows, columns, strict=True):
            by_image = block[:, :num_rows, :num_columns].unflatten(2, (-1, num_vision_tokens))
            ordered = by_image.permute(2, 1, 0, 3).flatten(0, 1)
            sample[_layer_name(layer)] = ordered.float().cpu().numpy()
    return samples


def _collate_attention(settings: AttentionTarget, samples: Sequence[Arrays]) -> dict[str, Any]:
    """Layer -> float32 'B H T J', padded with zeros; `num_images` of each sample orders its columns."""
    return {
        "attention": {
            layer: _pad_blocks([_by_row(s[_layer_name(layer)], int(s["num_images"])) for s in samples])
            for layer in settings.layers
        }
    }


def _by_row(stored: np.ndarray, num_images: int) -> Tensor:
    """Stored 'R H N' of one sample -> 'H T J'; rows that do not go round all images are left to coverage."""
    num_rows, num_heads, num_vision_tokens = stored.shape
    if num_images == 0:
        return torch.zeros(num_heads, 0, 0)
    whole = stored[: num_rows // num_images * num_images]
    by_image = torch.from_numpy(whole).view(num_images, -1, num_heads, num_vision_tokens)
    return by_image.permute(2, 1, 0, 3).flatten(2)


def _pad_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """'H T J' of each sample -> 'B H T J', zeros where a sample has fewer rows or columns."""
    rows, columns = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    padded = torch.zeros(len(blocks), blocks[0].shape[0], rows, columns)
    for index, block in enumerate(blocks):
        padded[index, :, : block.shape[1], : block.shape[2]] = block
    return padded


class VisionTarget(Section):
    """Projected vision features, once for each distinct image of a shard; `step` belongs to `fixed_point`."""

    source: Source = "cache"
    codec: Literal["fixed_point", "int8", "float16", "float32"] = "fixed_point"
    step: PowerOfTwo = 2**-7


def _vision_arrays(settings: VisionTarget, facts: TeacherFacts) -> list[ArraySpec]:
    # Channel-major: neighbouring tokens of one channel are alike, neighbouring channels of one token are not.
    shape = (facts.hidden_size, facts.num_vision_tokens)
    return [ArraySpec("vision", "I D N", shape, "image", settings.codec, _options(settings))]


def vision_array(features: Tensor) -> Arrays:
    """One image's projected features 'N D' as the store keeps them: float32 '1 D N'."""
    return {"vision": features.T[None].float().cpu().numpy()}


def _collate_vision(settings: VisionTarget, samples: Sequence[Arrays]) -> dict[str, Any]:
    """float32 'I N D', all images of the batch in order."""
    images = np.concatenate([sample["vision"] for sample in samples])
    return {"vision": torch.from_numpy(images).transpose(1, 2).contiguous()}


class LogitsTarget(Section):
    """The teacher's `top_k` log probabilities at answer positions, the rest's mass, `tail_samples` draws of it."""

    top_k: int = Field(default=32, ge=1)
    tail_samples: int = Field(default=0, ge=0, exclude_if=lambda samples: samples == 0)


def _logits_arrays(settings: LogitsTarget, facts: TeacherFacts) -> list[ArraySpec]:
    top_k = min(settings.top_k, facts.vocab_size)
    id_type = {"dtype": "uint16" if facts.vocab_size <= 2**16 else "int32"}
    arrays = [
        ArraySpec("logits/ids", "P K", (top_k,), "sample", "integer", id_type),
        ArraySpec("logits/log_probs", "P K", (top_k,), "sample", "float16", {}),
        ArraySpec("logits/tail", "P", (), "sample", "float16", {}),
    ]
    if settings.tail_samples == 0:
        return arrays
    if top_k == facts.vocab_size:
        raise ConfigError(
            f"targets.logits.tail_samples asks for {settings.tail_samples} draws outside the top {top_k}, but that "
            "is the whole vocabulary; set it to 0, or top_k lower"
        )
    shape = (settings.tail_samples,)
    return [
        *arrays,
        ArraySpec("logits/draw_ids", "P Z", shape, "sample", "integer", id_type),
        ArraySpec("logits/draw_log_probs", "P Z", shape, "sample", "float16", {}),
    ]


def _capture_logits(settings: LogitsTarget, forward: TeacherForward) -> list[Arrays]:
    """Per sample: ids 'P K', log probabilities 'P K' (descending), the log of the remaining mass 'P', draws 'P Z'."""
    assert forward.answer_logits is not None
    top_k = min(settings.top_k, forward.answer_logits.shape[1])
    ids = forward.answer_logits.topk(top_k, dim=-1).indices
    top, tail = with_tail(forward.answer_logits, ids)
    kept = {"logits/ids": ids, "logits/log_probs": top, "logits/tail": tail}
    if settings.tail_samples:
        log_probs = forward.answer_logits.float().log_softmax(dim=-1)
        draws = draw_tail(
            log_probs,
            ids,
            keys=forward.keys,
            num_answers=forward.num_answers,
            num_draws=settings.tail_samples,
        )
        kept |= {"logits/draw_ids": draws, "logits/draw_log_probs": log_probs.gather(1, draws)}
    # A probability below e^-30 is no information; -inf would only make the store's checks fail.
    parts = {
        name: (values.clamp(min=SMALLEST_LOG_PROBABILITY) if values.is_floating_point() else values)
        .cpu()
        .split(list(forward.num_answers))
        for name, values in kept.items()
    }
    return [{name: parts[name][i].numpy() for name in kept} for i in range(len(forward.num_answers))]


_LOGITS_FIELDS = {
    "top_ids": "logits/ids",
    "top_log_probs": "logits/log_probs",
    "tail_log_prob": "logits/tail",
    "draw_ids": "logits/draw_ids",
    "draw_log_probs": "logits/draw_log_probs",
}


def _collate_logits(settings: LogitsTarget, samples: Sequence[Arrays]) -> dict[str, Any]:
    """int64 ids 'A K' and 'A Z', float32 log probabilities; draws only where there are any."""
    fields: dict[str, Any] = {}
    for field, name in _LOGITS_FIELDS.items():
        if settings.tail_samples or "draw" not in field:
            values = torch.from_numpy(np.concatenate([sample[name] for sample in samples]))
            fields[field] = values if values.is_floating_point() else values.long()
    return fields


@dataclass(frozen=True)
class Target:
    """A row of TARGETS.

    `arrays`   what the store will hold, from settings and facts of the teacher
    `capture`  per-sample arrays of a batch; None for arrays that belong to images (see `vision_array`)
    `collate`  fields of `TeacherTargets` from what the store returned for each sample of a batch
    `rows`     how many rows of its first array a sample must bring, from images, text rows and answers, all 'B'
    `deepest`  the deepest decoder layer whose input it reads (-1: none); None if it needs the whole model
    """

    settings: type[Section]
    arrays: Callable[[Any, TeacherFacts], list[ArraySpec]]
    capture: Callable[[Any, TeacherForward], list[Arrays]] | None
    collate: Callable[[Any, Sequence[Arrays]], dict[str, Any]]
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    deepest: Callable[[Any], int | None]
    first_array: Callable[[Any], str]


TARGETS: dict[str, Target] = {
    "attention": Target(
        AttentionTarget,
        arrays=_attention_arrays,
        capture=_capture_attention,
        collate=_collate_attention,
        rows=lambda images, text, answers: images * text,
        deepest=lambda settings: settings.layers[-1],
        first_array=lambda settings: _layer_name(settings.layers[0]),
    ),
    "vision": Target(
        VisionTarget,
        arrays=_vision_arrays,
        capture=None,
        collate=_collate_vision,
        rows=lambda images, text, answers: images,
        deepest=lambda settings: -1,
        first_array=lambda settings: "vision",
    ),
    "logits": Target(
        LogitsTarget,
        arrays=_logits_arrays,
        capture=_capture_logits,
        collate=_collate_logits,
        rows=lambda images, text, answers: answers,
        deepest=lambda settings: None,
        first_array=lambda settings: "logits/ids",
    ),
}


def deepest_layer(targets: Mapping[str, Any]) -> int | None:
    """The deepest decoder layer that the targets read; -1 if none, None if one needs the whole model."""
    depths = [TARGETS[name].deepest(settings) for name, settings in targets.items()]
    return None if None in depths else max(depths, default=-1)  # pyright: ignore[reportArgumentType]
