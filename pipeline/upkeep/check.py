"""`alignkd check`: some stored samples captured again with the live teacher, and how far the two are apart.

Three questions: are the stored values what the teacher says, within the error that the store states; do its answers
agree; and what does a student's loss, and the gradient of it, make of the difference?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from cache import CODECS, ArraySpec, FingerprintMismatch, Store
from pipeline.config.config import Config
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.sample import JoinedSample
from pipeline.distill.join.stores import REMEDY
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.student import load_student
from pipeline.losses.losses import LOSSES
from pipeline.models.stub import Teacher, load_teacher
from pipeline.targets.target import TeacherFacts
from pipeline.teacher_cache.capture import captured_arrays
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture

# What one computation may differ by when its batches are cut otherwise, of the largest value of an array.
ROUNDING = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}
IDS, LOG_PROBS = "logits/ids", "logits/log_probs"
DRAW_IDS, DRAW_LOG_PROBS = "logits/draw_ids", "logits/draw_log_probs"

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ArrayCheck:
    """A stored array against the live one: errors absolute; `of_limit` the largest error over what it may be."""

    name: str
    values: int
    max_error: float
    mean_error: float
    cosine: float
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
    """What was compared. `losses` is empty, and `losses_absent` says why, where no student could be had."""

    samples: int
    teacher: str
    is_stub: bool
    dtype: str
    arrays: tuple[ArrayCheck, ...]
    logits: LogitsCheck | None
    losses: tuple[LossCheck, ...]
    losses_absent: str

    @property
    def is_sound(self) -> bool:
        """Every value within its limit, and no answer another one."""
        return all(array.of_limit <= 1 for array in self.arrays)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_sound": self.is_sound}


def check_store(config: Config, *, num_samples: int, seed: int, with_losses: bool = True) -> Check:
    """Capture `num_samples` of the store's samples again, chosen by `seed`, and compare.

    Raises `FingerprintMismatch` if the config's teacher or settings are not the store's, `JoinError` if a shard
    changed.
    """
    plan = plan_capture(config)
    store = Store(config.one_cache.path)
    if differences := store.manifest.differences(plan.manifest):
        raise FingerprintMismatch(store.path, differences, remedy=REMEDY)
    dataset = JoinedDataset(store, config.data.shards, plan.preparation, targets=config.targets.cached())
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:num_samples]
    stored = [dataset[int(number)] for number in sorted(chosen)]
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    live = [sample for batch in _batches(stored, 8) for sample in captured_again(config, teacher, batch)]
    absent = "" if with_losses else "not asked for"
    return Check(
        samples=len(stored),
        teacher=config.teacher.model,
        is_stub=plan.teacher.is_stub,
        dtype=plan.manifest.capture["dtype"],
        arrays=tuple(_compare_arrays(plan, stored, live)),
        logits=_compare_logits(stored, live),
        losses=tuple(_compare_losses(config, store, stored, live)) if with_losses else (),
        losses_absent=absent,
    )


def captured_again(config: Config, teacher: Teacher, samples: Sequence[JoinedSample]) -> list[JoinedSample]:
    """The samples with the arrays that the live teacher gives, unencoded."""
    pixels = {digest: image for sample in samples for digest, image in sample.pixels.items()}
    vision: dict[str, torch.Tensor] = {}
    if pixels:
        vision = dict(zip(pixels, teacher.encode_images(torch.stack(list(pixels.values()))), strict=True))
    in_order = [vision[digest] for sample in samples for digest in sample.image_digests]
    targets, facts = config.targets.cached(), teacher.plan.facts
    tokens, keys = [sample.tokens for sample in samples], [sample.key for sample in samples]
    captured, images = captured_arrays(
        teacher,
        targets,
        tokens,
        torch.stack(in_order) if in_order else None,
        keys=keys,
        keep=list(vision.values()),
    )
    by_digest = dict(zip(vision, images, strict=True))
    of_images = [
        spec.name for target in targets.values() if target.owner == "image" for spec in target.arrays(facts)
    ]
    again = []
    for sample, arrays in zip(samples, captured, strict=True):
        for name in of_images:
            own = [by_digest[digest][name] for digest in sample.image_digests]
            arrays[name] = np.concatenate([sample.arrays[name][:0], *own])
        again.append(replace(sample, arrays=arrays | {"num_images": sample.arrays["num_images"]}))
    return again


def _compare_arrays(
    plan: CapturePlan, stored: Sequence[JoinedSample], live: Sequence[JoinedSample]
) -> Iterator[ArrayCheck]:
    rounding = ROUNDING[plan.manifest.capture["dtype"]]
    for spec in plan.manifest.arrays:
        if spec.name not in stored[0].arrays:
            continue  # tokens: the join compared them
        theirs = np.concatenate([sample.arrays[spec.name] for sample in stored])
        ours = np.concatenate([sample.arrays[spec.name] for sample in live])
        if spec.name == IDS:
            yield _compare_ids(spec, stored, live, rounding)
        elif spec.name == DRAW_IDS:
            yield _compare_draws(spec, stored, live, rounding)
        elif spec.name == DRAW_LOG_PROBS:
            same = [
                ours.arrays[DRAW_IDS] == theirs.arrays[DRAW_IDS]
                for ours, theirs in zip(live, stored, strict=True)
            ]
            yield _compare(
                spec, theirs[np.concatenate(same)].astype(np.float64), ours[np.concatenate(same)], rounding
            )
        else:
            yield _compare(spec, theirs.astype(np.float64), ours, rounding)


def _compare(spec: ArraySpec, stored: np.ndarray, live: np.ndarray, rounding: float) -> ArrayCheck:
    codec, error = CODECS[spec.codec], np.abs(stored - live)
    limit = codec.max_error(live, spec.options) + rounding * np.abs(live).max(initial=0)
    norms = np.linalg.norm(stored) * np.linalg.norm(live.astype(np.float64))
    return ArrayCheck(
        name=spec.name,
        values=live.size,
        max_error=float(error.max(initial=0)),
        mean_error=float(error.mean()) if live.size else 0.0,
        cosine=float((stored * live).sum() / norms) if norms else 1.0,
        of_limit=float((error / np.maximum(limit, 1e-30)).max(initial=0)),
        stated_error=codec.stated_error(spec.options),
    )


def _compare_ids(
    spec: ArraySpec, stored: Sequence[JoinedSample], live: Sequence[JoinedSample], rounding: float
) -> ArrayCheck:
    """Of tokens as likely as each other either may come first: an id is wrong by how much less likely it is."""
    errors = [np.zeros(0)]
    for theirs, ours in zip(stored, live, strict=True):
        ids, log_probs = ours.arrays[IDS], ours.arrays[LOG_PROBS]
        for at, row in enumerate(theirs.arrays[IDS]):
            known = dict(zip(ids[at].tolist(), log_probs[at].tolist(), strict=True))
            found = np.array([known.get(number, log_probs[at].min()) for number in row.tolist()])
            errors.append(np.abs(log_probs[at] - found))
    error = np.concatenate(errors)
    limit = rounding * max((float(np.abs(s.arrays[LOG_PROBS]).max(initial=0)) for s in live), default=0.0)
    same = np.mean(
        [
            np.mean(a.arrays[IDS] == b.arrays[IDS])
            for a, b in zip(stored, live, strict=True)
            if len(a.arrays[IDS])
        ]
    )
    return ArrayCheck(
        spec.name, error.size, float(error.max(initial=0)), float(error.mean()) if error.size else 0.0, float(same),
        float(error.max(initial=0) / max(limit, 1e-30)), "how much less likely than the live one at its rank",
    )  # fmt: skip


def _compare_draws(
    spec: ArraySpec, stored: Sequence[JoinedSample], live: Sequence[JoinedSample], rounding: float
) -> ArrayCheck:
    """Rounding may move a draw to the next id; it is wrong if the live top K holds it, by how far it is inside.

    `cosine` is the share of draws that are the live teacher's, too.
    """
    errors, same, largest = [np.zeros(0)], [np.zeros(0)], 0.0
    for theirs, ours in zip(stored, live, strict=True):
        ids, log_probs = ours.arrays[IDS], ours.arrays[LOG_PROBS]
        is_top = theirs.arrays[DRAW_IDS][:, :, None] == ids[:, None, :]
        inside = log_probs - log_probs.min(axis=-1, keepdims=True)
        errors.append((is_top * inside[:, None, :]).sum(axis=-1).ravel())
        same.append((theirs.arrays[DRAW_IDS] == ours.arrays[DRAW_IDS]).ravel())
        largest = max(largest, float(np.abs(log_probs).max(initial=0)))
    error, agreed = np.concatenate(errors), np.concatenate(same)
    mean, share = (float(values.mean()) if values.size else 0.0 for values in (error, agreed))
    worst = float(error.max(initial=0))
    of_limit = worst / max(rounding * largest, 1e-30)
    return ArrayCheck(spec.name, error.size, worst, mean, share, of_limit, "how far inside the live top K")


def _compare_logits(stored: Sequence[JoinedSample], live: Sequence[JoinedSample]) -> LogitsCheck | None:
    if IDS not in stored[0].arrays:
        return None
    agree, divergence = [np.zeros(0)], [np.zeros(0)]
    for theirs, ours in zip(stored, live, strict=True):
        agree.append(theirs.arrays[IDS][:, 0] == ours.arrays[IDS][:, 0])
        divergence.append(_kl(ours.arrays, theirs.arrays))
    agreed, kl = np.concatenate(agree), np.concatenate(divergence)
    if not agreed.size:
        return None
    return LogitsCheck(agreed.size, float(agreed.mean()), float(kl.mean()))


def _kl(live: Arrays, stored: Arrays) -> np.ndarray:
    """KL(live || stored) of a sample's answer positions, over the live top K and a bucket for the rest."""
    per_position = []
    for ids, ours, other_ids, theirs in zip(
        live[IDS], live[LOG_PROBS], stored[IDS], stored[LOG_PROBS], strict=True
    ):
        known = dict(zip(other_ids.tolist(), theirs.tolist(), strict=True))
        shared = [
            (p, known[number])
            for number, p in zip(ids.tolist(), ours.tolist(), strict=True)
            if number in known
        ]
        p, q = (
            (np.exp(np.array(column)) for column in zip(*shared, strict=True))
            if shared
            else (np.zeros(0),) * 2
        )
        p, q = (np.append(values, max(1 - values.sum(), 1e-8)) for values in (p, q))
        per_position.append(float((p * np.log(p / q)).sum()))
    return np.array(per_position)


def _compare_losses(
    config: Config, store: Store, stored: Sequence[JoinedSample], live: Sequence[JoinedSample]
) -> Iterator[LossCheck]:
    """Each loss of the config's student, at its first weights, over all samples."""
    losses = {name: loss for name, loss in config.losses.active().items() if LOSSES[name].targets}
    torch.manual_seed(0)  # of the trained heads' first weights
    facts = dict.fromkeys(config.targets.active(), TeacherFacts.of(store.manifest))
    distiller = Distiller(load_student(config, store), losses, facts=facts).float()
    collate = JoinCollator(config.targets.cached())
    theirs, ours = (loss_terms(distiller, collate, samples) for samples in (stored, live))
    for name in losses:
        (value, gradient), (live_value, live_gradient) = theirs[name], ours[name]
        norms = gradient.norm() * live_gradient.norm()
        cosine = float(gradient @ live_gradient / norms) if norms else 1.0
        yield LossCheck(name, value, live_value, cosine)


def loss_terms(
    distiller: Distiller, collate: JoinCollator, samples: Sequence[JoinedSample]
) -> dict[str, tuple[float, torch.Tensor]]:
    """Loss -> its mean over the samples, and the gradient of that in all trained parameters as one vector."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    totals: dict[str, list[Any]] = {}
    for batch in _batches(samples, 8):
        for name, (total, count) in distiller(collate(batch)).items():
            gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(gradients, parameters, strict=True)
                ]
            )
            known = totals.setdefault(name, [0.0, 0.0, torch.zeros_like(flat)])
            totals[name] = [known[0] + float(total.detach()), known[1] + float(count), known[2] + flat]
    return {name: (total / max(count, 1), gradient) for name, (total, count, gradient) in totals.items()}


def _batches(samples: Sequence[JoinedSample], size: int) -> Iterator[Sequence[JoinedSample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
