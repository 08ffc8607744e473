"""One stored sample: its tokens, labels and images, and the teacher's attention and answers. Opens no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache import Store
from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample, check_conversations
from pipeline.data.images import ImagePreprocessor
from pipeline.data.preparation import Preparation
from pipeline.data.shards import parse_record, read_span
from pipeline.distill.join.dataset import JoinCollator
from pipeline.distill.join.sample import join_sample
from pipeline.errors import ConfigError, JoinError
from pipeline.inspection.sources import (
    check_reading,
    find_preparation,
    find_shard,
    locate_sample,
    stored_config,
)
from pipeline.inspection.token_text import token_text
from pipeline.losses.losses import AttentionLoss, VisionFocusLoss, focus_tokens, row_kl
from pipeline.models.checkpoint import checkpoint_folder
from pipeline.models.configuration import read_config
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Slots, find_slots
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.target import TeacherFacts
from pipeline.targets.targets import TARGETS

SHOWN = ("attention", "logits")


@dataclass(frozen=True)
class Answer:
    """A trained token: its index among the sample's tokens, and the teacher's likeliest tokens as (text, share)."""

    place: int
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Inspection:
    """One sample as the teacher saw it, and what the store holds of the teacher.

    `tokens` is the text of every id, or the id itself where `note` says why there is no tokenizer. `images` are the
    vision tower's input. `slots` are positions in the merged sequence ('1 T' and '1 J'). `attention` is layer ->
    float32 'H T J' (H is 1 for a stored mean of the heads), empty if the store has none. `focus`, int64 'I k', are
    the vision tokens of each image that the text attends most in `layer`, the most attended first. `answers` are the
    trained tokens, without `likeliest` if the store has no logits.
    """

    store: str
    config: Config
    key: str
    conversations: list[dict[str, str]]
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    tokens: tuple[str, ...]
    note: str
    images: tuple[Image.Image, ...]
    teacher: TeacherFacts
    slots: Slots
    attention: Mapping[int, Tensor]
    layer: int
    focus: Tensor
    answers: tuple[Answer, ...]

    @property
    def grid(self) -> int:
        """Vision tokens along a side of an image."""
        return round(self.teacher.num_vision_tokens**0.5)

    @property
    def text(self) -> tuple[int, ...]:
        """The T rows of the attention as indices of `tokens`: the text after the first image."""
        ids = self.input_ids
        first = ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else len(ids)
        return tuple(n for n in range(first, len(ids)) if ids[n] != IMAGE_TOKEN_INDEX)


def inspect_sample(
    store: str | Path,
    key: str,
    *,
    config: Config | None = None,
    layer: int | None = None,
    k: int | None = None,
) -> Inspection:
    """Read a sample from the store and its shard, and compare the two as stage 2 does.

    `config` defaults to that of stage 1, from the store. `k` defaults to `losses.vision_focus.k`, `layer` to the
    first stored layer that the losses read. Raises `PipelineError` for an unknown key, `ConfigError` if the shard or
    the layer is not found, `JoinError` if the shard changed, and `FingerprintMismatch` if the config reads text or
    images in another way than the teacher did.
    """
    opened = Store(store)
    part, entry = locate_sample(opened, key)
    config = config or stored_config(opened)
    shard = find_shard(config, part, key)
    preparation, note = find_preparation(config, opened)
    # With the settings of the store's own targets: the config may have others.
    stored = opened.manifest.capture["targets"]
    captured = {name: TARGETS[name].model_validate(stored[name]) for name in SHOWN if name in stored}
    joined = join_sample(opened, shard, entry, preparation, captured)
    tokens, targets = joined.tokens, JoinCollator(captured)([joined])["targets"]
    slots = _slots(tokens, preparation.num_vision_tokens)
    attention = {layer: block[0] for layer, block in targets.get("attention", {}).items()}
    _check_rows(opened, key, attention, slots)
    layer = _choose_layer(layer, opened, config, attention)
    conversations: Any = parse_record(read_span(shard, entry.json_span)).get("conversations")
    check_conversations(conversations, num_images=len(entry.images))
    return Inspection(
        store=str(opened.path),
        config=config,
        key=key,
        conversations=conversations,
        input_ids=tokens.input_ids,
        labels=tokens.labels,
        tokens=tuple(token_text(number, preparation.tokenizer) for number in tokens.input_ids),
        note=note,
        images=tuple(_picture(joined.pixels[digest], preparation.preprocess) for digest in entry.images),
        teacher=TeacherFacts.of(opened.manifest),
        slots=slots,
        attention=attention,
        layer=layer,
        focus=_focus(k, config, attention.get(layer), slots, preparation.num_vision_tokens),
        answers=_answers(tokens, targets, preparation.tokenizer),
    )


def paired_layer(inspection: Inspection) -> int:
    """Return the student's layer that `losses.attention` pairs with the shown one; raises `ConfigError` if none."""
    pairs = dict((inspection.config.losses.active().get("attention") or AttentionLoss()).layers)
    if inspection.layer not in pairs:
        raise ConfigError(
            f"losses.attention pairs no student layer with the teacher's layer {inspection.layer}; "
            "say which one to show with --student-layer"
        )
    return pairs[inspection.layer]


def student_attention(inspection: Inspection, checkpoint: str, *, layer: int) -> Tensor:
    """Return a student's text-to-vision attention for the sample, mean over its heads: float32 'T J'.

    Loads only the tensors that the layer needs. Raises `ConfigError` if the checkpoint has no such layer or another
    number of vision tokens, and `FingerprintMismatch` if it reads text or images in another way than the teacher did.
    """
    _check_shape(inspection, checkpoint, layer)
    store = Store(inspection.store)
    preparation = Preparation.of(checkpoint, inspection.config.data)
    check_reading(store, preparation)
    part, entry = store.locate(inspection.key)
    shard = find_shard(inspection.config, part, inspection.key)
    batch = JoinCollator({})([join_sample(store, shard, entry, preparation, {})])
    # A stub can be made of any checkpoint of the family, also of a student's.
    plan = plan_teacher(checkpoint, targets={"attention": AttentionTarget(layers=[layer])})
    stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
    vision = None if batch["pixel_values"] is None else stub.encode_images(batch["pixel_values"])
    forward = stub.forward(batch["input_ids"], batch["attention_mask"], batch["labels"], vision)
    return forward.attention[layer][0].mean(dim=0)


def attention_distance(inspection: Inspection, student: Tensor) -> float:
    """Return KL(teacher || student) in nats, mean over the T text rows, of a student's 'T J' in the shown layer.

    It is the value of `losses.attention` with `heads: mean`.
    """
    return float(row_kl(inspection.attention[inspection.layer].mean(dim=0), student).mean())


def _slots(tokens: TokenizedSample, num_vision_tokens: int) -> Slots:
    is_image = torch.tensor(tokens.input_ids) == IMAGE_TOKEN_INDEX
    is_vision = is_image.repeat_interleave(torch.where(is_image, num_vision_tokens, 1))[None]
    return find_slots(is_vision, torch.ones_like(is_vision))


def _check_rows(store: Store, key: str, attention: Mapping[int, Tensor], slots: Slots) -> None:
    expected = (slots.text.shape[1], slots.vision.shape[1])
    for block in attention.values():
        if (found := tuple(block.shape[1:])) != expected:
            raise JoinError(
                f"sample {key!r}: {store.path} keeps {found[0]} rows of attention to {found[1]} vision "
                f"tokens, its tokens ask for {expected[0]} to {expected[1]}; run `alignkd verify` on the store"
            )


def _choose_layer(asked: int | None, store: Store, config: Config, attention: Mapping[int, Tensor]) -> int:
    if asked is None:
        losses = config.losses.active().values()
        read = [
            layer for loss in losses if hasattr(loss, "teacher_layers") for layer in loss.teacher_layers()
        ]
        return next((layer for layer in read if layer in attention), min(attention, default=0))
    if attention and asked not in attention:
        raise ConfigError(
            f"layer {asked}: {store.path} keeps the attention of layers {', '.join(map(str, attention))}; "
            "ask for one of these"
        )
    return asked


def _focus(
    k: int | None, config: Config, attention: Tensor | None, slots: Slots, num_vision_tokens: int
) -> Tensor:
    loss = config.losses.active().get("vision_focus") or VisionFocusLoss()
    size = loss.k if k is None else k
    if size < 1:
        raise ConfigError(f"k: expected a number of focus tokens from 1 on, found {size}")
    if attention is None:
        return torch.zeros(0, size, dtype=torch.long)
    return focus_tokens(attention[None], slots, num_vision_tokens, size)


def _picture(pixels: Tensor, preprocess: ImagePreprocessor) -> Image.Image:
    """Return the tower's input, 'C Y X', as a picture: the normalisation is undone."""
    mean, std = (np.array(values) for values in (preprocess.clip.image_mean, preprocess.clip.image_std))
    colours = pixels.permute(1, 2, 0).numpy() * std + mean
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def _answers(tokens: TokenizedSample, targets: Mapping[str, Any], tokenizer: Any) -> tuple[Answer, ...]:
    """Return every trained token with the teacher's top K there, the likeliest first."""
    places = [n for n, label in enumerate(tokens.labels) if n and label != IGNORE_INDEX]
    if "top_ids" not in targets:
        return tuple(Answer(place, ()) for place in places)
    ids, shares = targets["top_ids"].tolist(), targets["top_log_probs"].float().exp().tolist()
    return tuple(
        Answer(place, tuple(zip([token_text(n, tokenizer) for n in i], s, strict=True)))
        for place, i, s in zip(places, ids, shares, strict=True)
    )


def _check_shape(inspection: Inspection, checkpoint: str, layer: int) -> None:
    shape = read_config(checkpoint_folder(checkpoint))
    if not 0 <= layer < shape.num_hidden_layers:
        raise ConfigError(
            f"layer {layer}: the student {checkpoint} has layers 0 to {shape.num_hidden_layers - 1}; "
            "ask for one of these"
        )
    if shape.num_vision_tokens != inspection.teacher.num_vision_tokens:
        raise ConfigError(
            f"the student {checkpoint} makes {shape.num_vision_tokens} vision tokens of an image, the teacher of "
            f"{inspection.store} {inspection.teacher.num_vision_tokens}; compare a student of the teacher's family"
        )
