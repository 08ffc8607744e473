"""What is known of one stored sample: tokens, labels, images, and what its teacher looked at. Opens no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cache import SampleEntry, Store
from pipeline.config.config import Config
from pipeline.data.conversation import TokenizedSample, check_conversations
from pipeline.data.images import ImagePreprocessor
from pipeline.data.preparation import Preparation
from pipeline.data.shards import parse_record, read_span
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset, JoinedSample, teacher_facts
from pipeline.errors import ConfigError, JoinError
from pipeline.inspection.sources import (
    check_reading,
    find_preparation,
    find_shard,
    locate_sample,
    stored_config,
)
from pipeline.inspection.token_text import token_text
from pipeline.losses.losses import (
    LOSSES,
    AttentionLoss,
    StudentOutputs,
    TeacherTargets,
    VisionFocusLoss,
    focus_tokens,
)
from pipeline.models.checkpoint import checkpoint_folder
from pipeline.models.configuration import read_config
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Slots, find_slots
from pipeline.targets.targets import TARGETS, AttentionTarget, TeacherFacts

SHOWN = ("attention", "logits")


@dataclass(frozen=True)
class Answer:
    """A trained token: its place among the sample's tokens, and the teacher's likeliest there as (text, share)."""

    place: int
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Inspection:
    """One sample as the teacher saw it, and what the store kept of the teacher.

    `tokens` is the text of every id, or the id itself where `note` says why there is no tokenizer. `images` are what
    the vision tower reads. `slots` are positions in the merged sequence ('1 T' and '1 J'). `attention` is layer ->
    float32 'H T J' (H is 1 where the store keeps the mean of the heads), empty if it keeps none. `focus`, int64
    'I k', are the vision tokens of each image that the text attends most in `layer`, the most attended first.
    `answers` are the trained tokens, without `likeliest` where the store keeps no logits.
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
        """The T rows of the attention as places in `tokens`: text after the first image."""
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
    """Read a sample from the store and its shard, compared with each other as stage 2 compares them.

    Without `config`, that of stage 1 says where shards and tokenizer are: the store carries it. `k` defaults to
    `losses.vision_focus.k`, `layer` to the first stored one that the losses read. Raises `PipelineError` for an
    unknown key, `ConfigError` if the shard is not where the config says or the layer is not stored, `JoinError` if
    the shard changed, and `FingerprintMismatch` if the config reads text or images otherwise than the teacher did.
    """
    opened = Store(store)
    part, entry = locate_sample(opened, key)
    config = config or stored_config(opened)
    shard = find_shard(config, part, key)
    preparation, note = find_preparation(config, opened)
    joined = _join(opened, entry, shard, preparation)
    tokens, images = joined.tokens, [joined.pixels[digest] for digest in joined.image_digests]
    slots = _slots(tokens, preparation.num_vision_tokens)
    targets = JoinCollator(_captured(opened))([joined])["targets"]
    attention = _attention(opened, joined, targets, slots)
    layer = _layer_of_losses(config, attention) if layer is None else _stored_layer(opened, attention, layer)
    return Inspection(
        store=str(opened.path),
        config=config,
        key=key,
        conversations=_conversations(shard, entry),
        input_ids=tokens.input_ids,
        labels=tokens.labels,
        tokens=tuple(token_text(number, preparation.tokenizer) for number in tokens.input_ids),
        note=note,
        images=tuple(_picture(pixels, preparation.preprocess) for pixels in images),
        teacher=teacher_facts(opened),
        slots=slots,
        attention=attention,
        layer=layer,
        focus=_focus(attention.get(layer), slots, preparation.num_vision_tokens, _focus_size(config, k)),
        answers=_answers(tokens, targets, preparation.tokenizer),
    )


def paired_layer(inspection: Inspection) -> int:
    """The student's layer that `losses.attention` holds to the inspection's. Raises `ConfigError` if none."""
    pairs = dict((inspection.config.losses.active().get("attention") or AttentionLoss()).layers)
    if inspection.layer not in pairs:
        raise ConfigError(
            f"losses.attention pairs no student layer with the teacher's layer {inspection.layer}; "
            "say which one to show with --student-layer"
        )
    return pairs[inspection.layer]


def student_attention(inspection: Inspection, checkpoint: str, *, layer: int) -> Tensor:
    """A student's own text-to-vision attention for the sample, mean over its heads: float32 'T J'.

    Loads only the tensors that the layer needs. Raises `ConfigError` if the checkpoint has no such layer or another
    number of vision tokens, `FingerprintMismatch` if it reads text or images otherwise than the teacher did.
    """
    _check_shape(inspection, checkpoint, layer)
    store = Store(inspection.store)
    preparation = Preparation.of(checkpoint, inspection.config.data)
    check_reading(store, preparation)
    part, entry = store.locate(inspection.key)
    shard = find_shard(inspection.config, part, inspection.key)
    batch = JoinCollator({})([_join(store, entry, shard, preparation)])
    # A stub is cut from any checkpoint of the family, a student's too.
    plan = plan_teacher(checkpoint, targets={"attention": AttentionTarget(layers=[layer])})
    stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
    vision = None if batch["pixel_values"] is None else stub.encode_images(batch["pixel_values"])
    forward = stub.forward(batch["input_ids"], batch["attention_mask"], batch["labels"], vision)
    return forward.attention[layer][0].mean(dim=0)


def attention_distance(inspection: Inspection, student: Tensor) -> float:
    """KL(teacher || student) in nats, mean over the T text rows, of a student's 'T J' in the inspection's layer.

    It is the value of `losses.attention` with `heads: mean`: a row is a distribution over the vision tokens and one
    bucket for everything else.
    """
    nothing = torch.zeros(0, 1)
    ours = StudentOutputs(
        nothing, torch.zeros(0).long(), inspection.slots, attention={0: student[None, None]}
    )
    theirs = TeacherTargets(attention={0: inspection.attention[inspection.layer][None]})
    total, count = LOSSES["attention"].compute(ours, theirs, None, AttentionLoss())
    return float(total / count)


def _join(store: Store, entry: SampleEntry, shard: str, preparation: Preparation) -> JoinedSample:
    """The sample of stage 2: text, images and stored arrays, compared with each other."""
    dataset = JoinedDataset(store, shard, preparation, targets=_captured(store))
    row = next(n for n, (_, other) in enumerate(dataset.rows) if other.key == entry.key)
    if preparation.tokenizer is None:
        dataset.verified[row] = True  # there is nothing to read the text with, so nothing to compare
    return dataset[row]


def _conversations(shard: str, entry: SampleEntry) -> list[dict[str, str]]:
    conversations: Any = parse_record(read_span(shard, entry.json_span)).get("conversations")
    check_conversations(conversations, num_images=len(entry.images))
    return conversations


def _captured(store: Store) -> dict[str, Any]:
    """The targets that are shown, with the settings that the store was made with: a given config may have others."""
    captured = store.manifest.capture["targets"]
    return {name: TARGETS[name].settings.model_validate(captured[name]) for name in SHOWN if name in captured}


def _slots(tokens: TokenizedSample, num_vision_tokens: int) -> Slots:
    is_vision = [
        number == IMAGE_TOKEN_INDEX
        for number in tokens.input_ids
        for _ in range(num_vision_tokens if number == IMAGE_TOKEN_INDEX else 1)
    ]
    return find_slots(torch.tensor([is_vision]), torch.ones(1, len(is_vision), dtype=torch.bool))


def _attention(
    store: Store, sample: JoinedSample, targets: Mapping[str, Any], slots: Slots
) -> dict[int, Tensor]:
    """Layer -> float32 'H T J' of the one sample of a batch; {} if the store keeps no attention."""
    attention = {layer: block[0] for layer, block in targets.get("attention", {}).items()}
    asked = (slots.text.shape[1], slots.vision.shape[1])
    for block in attention.values():
        if (found := tuple(block.shape[1:])) != asked:
            raise JoinError(
                f"sample {sample.key!r}: {store.path} keeps {found[0]} rows of attention to {found[1]} vision "
                f"tokens, its tokens ask for {asked[0]} to {asked[1]}; run `alignkd verify` on the store"
            )
    return attention


def _layer_of_losses(config: Config, attention: Mapping[int, Tensor]) -> int:
    losses = config.losses.active().values()
    read = [layer for loss in losses if hasattr(loss, "teacher_layers") for layer in loss.teacher_layers()]
    return next((layer for layer in read if layer in attention), min(attention, default=0))


def _stored_layer(store: Store, attention: Mapping[int, Tensor], layer: int) -> int:
    if attention and layer not in attention:
        raise ConfigError(
            f"layer {layer}: {store.path} keeps the attention of layers {', '.join(map(str, attention))}; "
            "ask for one of these"
        )
    return layer


def _focus_size(config: Config, k: int | None) -> int:
    loss = config.losses.active().get("vision_focus") or VisionFocusLoss()
    size = loss.k if k is None else k
    if size < 1:
        raise ConfigError(f"k: expected a number of focus tokens from 1 on, found {size}")
    return size


def _focus(attention: Tensor | None, slots: Slots, num_vision_tokens: int, k: int) -> Tensor:
    if attention is None:
        return torch.zeros(0, k, dtype=torch.long)
    return focus_tokens(attention[None], slots, num_vision_tokens, k)


def _picture(pixels: Tensor, preprocess: ImagePreprocessor) -> Image.Image:
    """What the tower reads, 'C Y X', as a picture: normalisation undone."""
    mean, std = (np.array(values) for values in (preprocess.clip.image_mean, preprocess.clip.image_std))
    colours = pixels.permute(1, 2, 0).numpy() * std + mean
    return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))


def _answers(tokens: TokenizedSample, targets: Mapping[str, Any], tokenizer: Any) -> tuple[Answer, ...]:
    """Every trained token with the teacher's top K there, the likeliest first."""
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
