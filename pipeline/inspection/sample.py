"""One stored sample: its tokens, labels and images, and the teacher's attention and answers. Opens no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cache import Store
from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import parse_turns
from pipeline.data.spans import read_span
from pipeline.data.templates import IMAGE_TOKEN
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
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import facts_of_config, plan_teacher
from pipeline.positions import IGNORE_INDEX, Slots, find_slots
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

    `tokens` is the text of every id, or the id itself where `note` says why there is no tokenizer. `images` are what
    the vision tower sees. `sizes` are their numbers of vision tokens, and `grids` their rows and columns, (0, 0)
    where these are no single rectangle. `slots` are '1 T' and '1 J'. `attention` is layer -> float32 'H T J' (H is 1
    for a stored mean of the heads), empty if the store has none. `focus`, int64 'k' of each image, are the vision
    tokens that the text attends most in `layer`, the most attended first. `answers` are the trained tokens, without
    `likeliest` if the store has no logits.
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
    sizes: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    teacher: TeacherFacts
    slots: Slots
    attention: Mapping[int, Tensor]
    layer: int
    focus: tuple[Tensor, ...]
    answers: tuple[Answer, ...]

    @property
    def text(self) -> tuple[int, ...]:
        """The T rows of the attention as indices of `tokens`: the text after the first vision token."""
        return tuple(self.slots.text[0].tolist())

    @property
    def vision(self) -> frozenset[int]:
        """The vision tokens as indices of `tokens`."""
        return frozenset(self.slots.vision[0].tolist())


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
    batch = JoinCollator(captured, preparation.image_token_id)([joined])
    tokens, targets = joined.tokens, batch["targets"]
    slots = find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"])
    attention = {layer: block[0] for layer, block in targets.get("attention", {}).items()}
    _check_rows(opened, key, attention, slots)
    layer = _choose_layer(layer, opened, config, attention)
    turns = parse_turns(read_span(shard, entry.json_span), num_images=len(entry.images))
    return Inspection(
        store=str(opened.path),
        config=config,
        key=key,
        conversations=turns,
        input_ids=tokens.input_ids,
        labels=tokens.labels,
        tokens=tuple(
            IMAGE_TOKEN if number == preparation.image_token_id else token_text(number, preparation.tokenizer)
            for number in tokens.input_ids
        ),
        note=note,
        images=tuple(preparation.picture(read_span(shard, span)) for span in entry.image_spans),
        sizes=tokens.sizes,
        grids=tokens.grids,
        teacher=TeacherFacts.of(opened.manifest),
        slots=slots,
        attention=attention,
        layer=layer,
        focus=_focus(k, config, attention.get(layer), slots),
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
    preparation = load_preparation(checkpoint, inspection.config.data)
    check_reading(store, preparation)
    part, entry = store.locate(inspection.key)
    shard = find_shard(inspection.config, part, inspection.key)
    joined = join_sample(store, shard, entry, preparation, {})
    batch = JoinCollator({}, preparation.image_token_id)([joined])
    # A stub can be made of any checkpoint, also of a student's.
    plan = plan_teacher(checkpoint, targets={"attention": AttentionTarget(layers=[layer])})
    stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
    features = stub.encode_images(batch["images"], joined.tokens.sizes) if batch["images"] else None
    return stub.forward(batch, features).attention[layer][0].mean(dim=0)


def attention_distance(inspection: Inspection, student: Tensor) -> float:
    """Return KL(teacher || student) in nats, mean over the T text rows, of a student's 'T J' in the shown layer.

    It is the value of `losses.attention` with `heads: mean`.
    """
    return float(row_kl(inspection.attention[inspection.layer].mean(dim=0), student).mean())


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


def _focus(k: int | None, config: Config, attention: Tensor | None, slots: Slots) -> tuple[Tensor, ...]:
    loss = config.losses.active().get("vision_focus") or VisionFocusLoss()
    size = loss.k if k is None else k
    if size < 1:
        raise ConfigError(f"k: expected a number of focus tokens from 1 on, found {size}")
    return () if attention is None else tuple(focus_tokens(attention[None], slots, size))


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
    facts = facts_of_config(checkpoint, read_config(checkpoint_folder(checkpoint)))
    if not 0 <= layer < facts.num_layers:
        raise ConfigError(
            f"layer {layer}: the student {checkpoint} has layers 0 to {facts.num_layers - 1}; ask for one of these"
        )
    theirs, ours = inspection.teacher.num_vision_tokens, facts.num_vision_tokens
    if None not in (theirs, ours) and theirs != ours:
        raise ConfigError(
            f"the student {checkpoint} makes {ours} vision tokens of an image, the teacher of {inspection.store} "
            f"{theirs}; compare a student of the teacher's family"
        )
