"""`alignkd check`: capture some stored samples again with the live teacher, and compare.

It compares the stored values (are they within the error that the store states?), the teacher's answers, and the loss
of a student with its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from cache import CODECS, FingerprintMismatch, Store
from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import pad_tokens
from pipeline.data.spans import SpanReader
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.sample import JoinedSample
from pipeline.distill.join.stores import REMEDY
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.parts import load_student
from pipeline.losses.losses import LOSSES
from pipeline.models.stub import Teacher, load_teacher
from pipeline.models.vlm import ImageFeatures
from pipeline.targets.target import TeacherFacts
from pipeline.teacher_cache.blindness import Blindness
from pipeline.teacher_cache.captured_arrays import captured_arrays
from pipeline.teacher_cache.swapped_images import measure_blindness
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture
from pipeline.upkeep.check_rows import AllRows, Arrays

BATCH_SIZE = 8
# By how much one computation may differ between batch sizes, as a share of an array's largest value.
ROUNDING = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}
IDS, LOG_PROBS = "logits/ids", "logits/log_probs"
DRAW_IDS, DRAW_LOG_PROBS = "logits/draw_ids", "logits/draw_log_probs"


@dataclass(frozen=True)
class ArrayCheck:
    """A stored array compared with the live one: absolute errors; `of_limit` the largest error over its limit.

    `agreement` is the share of equal ids for arrays of token ids, and the cosine of the two for all others.
    """

    name: str
    values: int
    max_error: float
    mean_error: float
    agreement: float
    of_limit: float
    stated_error: str


@dataclass(frozen=True)
class LogitsCheck:
    """The teacher's answers: share of positions with the same likeliest token, and KL(live || stored) in nats."""

    positions: int
    top1_agreement: float
    kl: float


@dataclass(frozen=True)
class LossCheck:
    """A student's loss with stored and with live targets, and the cosine of the two gradients."""

    name: str
    stored: float
    live: float
    gradient_cosine: float


@dataclass(frozen=True)
class Check:
    """The results of a check. Where `losses` is empty, `losses_absent` may say why."""

    samples: int
    teacher: str
    is_stub: bool
    dtype: str
    arrays: tuple[ArrayCheck, ...]
    logits: LogitsCheck | None
    losses: tuple[LossCheck, ...]
    losses_absent: str
    blindness: Blindness

    @property
    def is_sound(self) -> bool:
        """Whether every value is within its limit."""
        return all(array.of_limit <= 1 for array in self.arrays)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for array in found["arrays"]:
            array["cosine"] = array.pop("agreement")  # the key that readers of the JSON know
        return found | {"blindness": self.blindness.to_json(), "is_sound": self.is_sound}


def check_store(config: Config, *, num_samples: int, seed: int, with_losses: bool = True) -> Check:
    """Capture `num_samples` of the store's samples again, chosen by `seed`, and compare.

    Raises `FingerprintMismatch` if the config's teacher or settings are not the store's, `JoinError` if a shard
    changed.
    """
    plan = plan_capture(config)
    store = Store(config.one_cache.path)
    expected = plan.manifest
    if store.manifest.format_version != expected.format_version:
        # An older store describes its arrays otherwise.
        expected = replace(expected, arrays=store.manifest.arrays)
    if differences := store.manifest.differences(expected):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)
    targets, read = config.targets.cached(), SpanReader.of(config.data)
    dataset = JoinedDataset(store, config.data.shards, plan.preparation, targets=targets, read=read)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:num_samples]
    stored = [dataset[int(number)] for number in sorted(chosen)]
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    live = [sample for batch in _batches(stored) for sample in captured_again(plan, teacher, batch)]
    arrays = [AllRows(samples) for samples in (stored, live)]
    absent = _why_without_losses(plan) if with_losses else "not asked for"
    return Check(
        samples=len(stored),
        teacher=config.teacher.model,
        is_stub=plan.teacher.is_stub,
        dtype=plan.manifest.capture["dtype"],
        arrays=tuple(_compare_arrays(plan, *arrays)),
        logits=_compare_logits(*arrays),
        losses=() if absent else tuple(_compare_losses(plan, store, stored, live)),
        losses_absent=absent,
        blindness=measure_blindness(plan.config, plan.shards, plan.preparation, teacher),
    )


def _why_without_losses(plan: CapturePlan) -> str:
    """Return why no student's losses can be compared on the samples as the teacher reads them, or ""."""
    student = load_preparation(plan.config.student.model, plan.config.data)
    reads_alike = student.digests() == plan.preparation.digests()
    return "" if reads_alike else "the student reads text or images in another way than the teacher"


def captured_again(
    plan: CapturePlan, teacher: Teacher, samples: Sequence[JoinedSample]
) -> list[JoinedSample]:
    """Return the samples with the arrays that the live teacher gives, not encoded."""
    pixels = {digest: image for sample in samples for digest, image in sample.pixels.items()}
    sizes = {
        d: s for sample in samples for d, s in zip(sample.image_digests, sample.tokens.sizes, strict=True)
    }
    vision: dict[str, ImageFeatures] = {}
    if pixels:
        features = teacher.encode_images(list(pixels.values()), [sizes[digest] for digest in pixels])
        vision = {digest: features.of([number]) for number, digest in enumerate(pixels)}
    in_order = [vision[digest] for sample in samples for digest in sample.image_digests]
    targets = plan.config.targets.cached()
    captured, images = captured_arrays(
        teacher,
        targets,
        pad_tokens([sample.tokens for sample in samples], plan.preparation.image_token_id),
        ImageFeatures.joined(in_order) if in_order else None,
        keys=[sample.key for sample in samples],
        keep=[one.flat for one in vision.values()],
    )
    by_digest = dict(zip(vision, images, strict=True))
    names = [name for target in targets.values() if target.owner == "image" for name in target.of_images()]
    again = []
    for sample, arrays in zip(samples, captured, strict=True):
        arrays |= {name: [by_digest[digest][name][0] for digest in sample.image_digests] for name in names}
        again.append(replace(sample, arrays=arrays))
    return again


def _compare_arrays(plan: CapturePlan, stored: AllRows, live: AllRows) -> Iterator[ArrayCheck]:
    rounding = ROUNDING[plan.manifest.capture["dtype"]]
    likeliest = rounding * np.abs(live[LOG_PROBS]).max(initial=0) if LOG_PROBS in live else 0.0
    for spec in plan.manifest.arrays:
        if spec.name not in stored:
            continue  # tokens, which the join compares
        theirs, ours, codec = stored[spec.name], live[spec.name], CODECS[spec.codec]
        if spec.name == IDS:
            error, stated = _rank_errors(stored, live), "how much less likely than the live one at its rank"
        elif spec.name == DRAW_IDS:
            error, stated = _draw_errors(stored, live), "how far inside the live top K"
        else:
            if spec.name == DRAW_LOG_PROBS:  # only of the draws that both drew
                same = stored[DRAW_IDS] == live[DRAW_IDS]
                theirs, ours = theirs[same], ours[same]
            error, stated = np.abs(theirs.astype(np.float64) - ours), codec.stated_error(spec.options)
        is_of_ids = spec.name in (IDS, DRAW_IDS)
        limit = likeliest
        if not is_of_ids:
            # Block by block, whose rows have a scale; of the draws that both drew `ours` is a part.
            blocks = [ours] if spec.name == DRAW_LOG_PROBS else live.blocks(spec.name)
            limits = [codec.max_error(block, spec.options).reshape(-1, *ours.shape[1:]) for block in blocks]
            limit = np.concatenate([*limits, ours[:0]]) + rounding * np.abs(ours).max(initial=0)
        yield ArrayCheck(
            name=spec.name,
            values=error.size,
            max_error=float(error.max(initial=0)),
            mean_error=float(error.mean()) if error.size else 0.0,
            agreement=_share_equal(theirs, ours) if is_of_ids else _cosine(theirs, ours),
            of_limit=float((error / np.maximum(limit, 1e-30)).max(initial=0)),
            stated_error=stated,
        )


def _rank_errors(stored: Arrays, live: Arrays) -> np.ndarray:
    """'P K': how much less likely each stored id is than the live one at its rank; of equally likely ones either
    may come first."""
    log_probs = live[LOG_PROBS]
    found, is_found = _values_of(stored[IDS], live[IDS], log_probs)
    return np.abs(log_probs - np.where(is_found, found, log_probs.min(-1, keepdims=True)))


def _draw_errors(stored: Arrays, live: Arrays) -> np.ndarray:
    """'P Z': how far each stored draw is inside the live top K; rounding may move it, but only to a next id."""
    inside = live[LOG_PROBS] - live[LOG_PROBS].min(axis=-1, keepdims=True)
    found, is_top = _values_of(stored[DRAW_IDS], live[IDS], inside)
    return np.where(is_top, found, 0)


def _values_of(wanted: np.ndarray, ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values 'P K' of `ids` at each of the ids `wanted` 'P J', and whether it is among them: 'P J'.

    Sorted and searched: comparing each with each would take 'P J K' of memory, gigabytes for a few hundred ids.
    """
    at_row = np.arange(len(ids))[:, None] << 32  # ids are below 2^32, so that each row has keys of its own
    keys, wanted_keys = (at_row + ids).ravel(), at_row + wanted
    order = keys.argsort()
    found = order[keys.searchsorted(wanted_keys, sorter=order).clip(max=keys.size - 1)]
    return values.ravel()[found], keys[found] == wanted_keys


def _share_equal(stored: np.ndarray, live: np.ndarray) -> float:
    return float((stored == live).mean()) if live.size else 0.0


def _cosine(one: Any, other: Any) -> float:
    """Cosine of two arrays as vectors, 1 where one is zero."""
    one, other = (np.asarray(values, dtype=np.float64).ravel() for values in (one, other))
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / norms) if norms else 1.0


def _compare_logits(stored: Arrays, live: Arrays) -> LogitsCheck | None:
    if IDS not in stored or not len(stored[IDS]):
        return None
    agreement = float((stored[IDS][:, 0] == live[IDS][:, 0]).mean())
    return LogitsCheck(len(stored[IDS]), agreement, float(_kl(live, stored).mean()))


def _kl(live: Arrays, stored: Arrays) -> np.ndarray:
    """'P': KL(live || stored) over the ids that both keep, and a bucket for the rest."""
    ours = live[LOG_PROBS].astype(np.float64)
    theirs, is_shared = _values_of(live[IDS], stored[IDS], stored[LOG_PROBS].astype(np.float64))
    p, q = (np.where(is_shared, np.exp(log_probs), 0) for log_probs in (ours, theirs))
    p, q = (np.column_stack([x, np.maximum(1 - x.sum(-1), 1e-8)]) for x in (p, q))
    return (p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1))).sum(-1)


def _compare_losses(
    plan: CapturePlan, store: Store, stored: Sequence[JoinedSample], live: Sequence[JoinedSample]
) -> Iterator[LossCheck]:
    """Each loss of the config's student, at its first weights, over all samples."""
    config = plan.config
    losses = {name: loss for name, loss in config.losses.active().items() if LOSSES[name].targets}
    torch.manual_seed(0)  # of the trained heads' first weights
    facts = dict.fromkeys(config.targets.active(), TeacherFacts.of(store.manifest))
    distiller = Distiller(load_student(config, store), losses, facts=facts).float()
    collate = JoinCollator(config.targets.cached(), plan.preparation.image_token_id)
    theirs, ours = (loss_terms(distiller, collate, samples) for samples in (stored, live))
    for name in losses:
        (value, gradient), (live_value, live_gradient) = theirs[name], ours[name]
        yield LossCheck(name, value, live_value, _cosine(gradient, live_gradient))


def loss_terms(
    distiller: Distiller, collate: JoinCollator, samples: Sequence[JoinedSample]
) -> dict[str, tuple[float, torch.Tensor]]:
    """Return loss -> its mean over the samples, and the gradient of its sum in all trained parameters, one vector."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    totals: dict[str, list[Any]] = {}
    for batch in _batches(samples):
        for name, (total, count) in distiller(collate(batch)).items():
            gradients = torch.autograd.grad(
                total, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found = (float(total.detach()), float(count), torch.cat([g.flatten() for g in gradients]))
            known = totals.get(name, (0.0, 0.0, 0.0))
            totals[name] = [one + other for one, other in zip(known, found, strict=True)]
    return {name: (total / max(count, 1), gradient) for name, (total, count, gradient) in totals.items()}


def _batches(samples: Sequence[JoinedSample]) -> Iterator[Sequence[JoinedSample]]:
    for start in range(0, len(samples), BATCH_SIZE):
        yield samples[start : start + BATCH_SIZE]
