"""What each way to store a target costs: bytes a sample beside the error of values, losses and gradients.

python -m bench.codecs                                       the demo's teacher and samples, with its store
python -m bench.codecs --student runs/demo/align_kd/model    the same at a trained student's weights
python -m bench.codecs --teacher-temperature 4               as if the teacher were less certain of its answers

Samples are captured once, unrounded and with the whole vocabulary; every choice then keeps, encodes, compresses and
decodes them as the store would. Errors are relative to what is unrounded. `1 - cosine` is of the loss's gradient in
all parameters of the student, summed over the samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer

from bench.tables import print_table
from cache import ArraySpec, Store, StoreWriter, part_sizes
from cache.format.codecs import decode_rows, encode_rows
from pipeline.config.config import Config, load_config
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset
from pipeline.distill.join.sample import JoinedSample
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.parts import load_student
from pipeline.losses.losses import LogitsLoss
from pipeline.models.stub import load_teacher
from pipeline.positions import Slots
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.target import TeacherFacts, TeacherForward
from pipeline.targets.targets import TARGETS
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture
from pipeline.upkeep.check import captured_again, loss_terms

# Of a target: its loss, codecs, the first of which loses nothing, and the powers of two of `fixed_point`'s steps.
CODED = {
    "attention": ("attention", ("float32", "float16", "sqrt_uint8"), range(-13, -9)),
    "vision": ("vision_all", ("float32", "float16", "int8"), range(-8, -3)),
}
TOP_K = (8, 16, 32, 50, 128)
DRAWS = ((8, 16), (8, 50), (16, 16), (16, 50))  # top K, and draws from the rest
FORMATS = {"bytes a sample": ",.0f", "values": ".1e", "loss error": ".1e", "1 - cosine of gradient": ".1e"}
app = typer.Typer(add_completion=False)


class Choice(NamedTuple):
    """A way to store a target, and the loss that shows what it costs; the first of a loss loses nothing."""

    target: str
    name: str
    settings: Any
    loss: str
    loss_settings: Any
    loss_name: str


def choices(config: Config, vocab_size: int) -> Iterator[Choice]:
    """The choices for the targets that the config stores; logits by forward and by reverse KL."""
    targets, losses = config.targets.cached(), config.losses.active()
    for target, (loss, codecs, powers) in CODED.items():
        tried = {codec: {"codec": codec} for codec in codecs}
        tried |= {f"fixed_point 2^{n}": {"codec": "fixed_point", "step": 2.0**n} for n in powers}
        for name, changes in tried.items() if target in targets and loss in losses else ():
            settings = targets[target].model_copy(update=changes)
            yield Choice(target, name, settings, loss, losses[loss], loss)
    if "logits" in targets:
        whole = {"whole vocabulary": LogitsTarget(top_k=vocab_size)}
        tops = {f"top {k} + bucket": LogitsTarget(top_k=k) for k in TOP_K if k < vocab_size}
        draws = {f"top {k} + {n} draws": LogitsTarget(top_k=k, tail_samples=n) for k, n in DRAWS}
        for direction, kept in (("forward", whole | tops | draws), ("reverse", whole | tops)):
            for name, settings in kept.items():
                loss = LogitsLoss(direction=direction)
                yield Choice("logits", name, settings, "logits", loss, f"logits {direction}")


def measure(config: Config, *, num_samples: int, temperature: float = 1.0) -> Iterator[dict[str, Any]]:
    """A row for each choice. Raises what stage 2 raises of a store that is not the config's."""
    plan, store = plan_capture(config), Store(config.one_cache.path)
    facts = plan.teacher.facts
    live = [_tempered(sample, temperature) for sample in _live_samples(config, store, plan, num_samples)]
    student, exact = load_student(config, store), {}
    for choice in choices(config, facts.vocab_size):
        specs = choice.settings.arrays(facts)
        kept = [_kept(choice, sample, facts.vocab_size) for sample in live]
        is_exact = choice.loss_name not in exact
        coded = kept if is_exact else [_decoded(sample, specs) for sample in kept]
        torch.manual_seed(0)  # the heads are the same for every choice
        losses = {choice.loss: choice.loss_settings}
        distiller = Distiller(student, losses, facts=dict.fromkeys(TARGETS, facts)).float()
        collate = JoinCollator({choice.target: choice.settings}, plan.preparation.image_token_id)
        terms = loss_terms(distiller, collate, coded)
        value, gradient = terms[choice.loss][0], terms[choice.loss][1].double()
        values = np.concatenate([_values(choice, sample, specs, facts) for sample in coded])
        of_loss = exact.setdefault(choice.loss_name, (value, gradient, values))
        exact_value, exact_gradient, exact_values = of_loss
        cosine = torch.cosine_similarity(gradient, exact_gradient, dim=0)
        yield {
            "target": choice.target,
            "stored as": choice.name,
            "loss": choice.loss_name,
            "bytes a sample": _bytes(store, kept, specs) / len(kept),
            "values": float(np.linalg.norm(values - exact_values) / np.linalg.norm(exact_values)),
            "loss error": abs(value - exact_value) / abs(exact_value),
            "1 - cosine of gradient": max(0.0, 1 - float(cosine)),
        }


def _live_samples(config: Config, store: Store, plan: CapturePlan, number: int) -> Iterator[JoinedSample]:
    """Samples as the teacher answers them now, unrounded; logits over the whole vocabulary."""
    dataset = JoinedDataset(store, config.data.shards, plan.preparation, targets=config.targets.cached())
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    if "logits" in config.targets.active():
        whole = {"logits": LogitsTarget(top_k=plan.teacher.facts.vocab_size)}
        config = config.model_copy(update={"targets": config.targets.model_copy(update=whole)})
    stored = [dataset[place] for place in range(min(number, len(dataset)))]
    for start in range(0, len(stored), 8):
        yield from captured_again(replace(plan, config=config), teacher, stored[start : start + 8])


def _tempered(sample: JoinedSample, temperature: float) -> JoinedSample:
    """The sample with its teacher's answers flattened; capturing normalises them again."""
    flat = {n: a / np.float32(temperature) for n, a in sample.arrays.items() if n == "logits/log_probs"}
    return replace(sample, arrays=sample.arrays | flat)


def _kept(choice: Choice, sample: JoinedSample, vocab_size: int) -> JoinedSample:
    """The sample with what stage 1 would keep of it, before encoding: logits go through their own capture."""
    if choice.target != "logits":
        return sample
    log_probs = torch.from_numpy(_log_probs(sample, vocab_size, missing=-30.0)).float()
    none = torch.zeros(1, 0, dtype=torch.long)
    forward = TeacherForward(Slots(none, none), {}, log_probs, [len(log_probs)], [()], keys=[sample.key])
    [arrays] = choice.settings.capture(forward)
    others = {name: array for name, array in sample.arrays.items() if not name.startswith("logits/")}
    return replace(sample, arrays=others | arrays)


def _log_probs(sample: JoinedSample, vocab_size: int, *, missing: float) -> np.ndarray:
    """Log probabilities 'P V' of the sample's top K; `missing` elsewhere."""
    ids = sample.arrays["logits/ids"].astype(np.int64)
    log_probs = np.full((len(ids), vocab_size), missing)
    np.put_along_axis(log_probs, ids, sample.arrays["logits/log_probs"].astype(np.float64), axis=1)
    return log_probs


def _decoded(sample: JoinedSample, specs: Sequence[ArraySpec]) -> JoinedSample:
    """The sample as it comes back from these codecs."""
    coded = {
        spec.name: [_coded(spec, block) for block in array]
        if isinstance(array := sample.arrays[spec.name], list)
        else decode_rows(spec, encode_rows(spec, array))
        for spec in specs
    }
    return replace(sample, arrays=sample.arrays | coded)


def _coded(spec: ArraySpec, block: np.ndarray) -> np.ndarray:
    """The block of one image, 'T H N' or 'D N', as it comes back from its codec."""
    spec = spec.with_tokens(block.shape[-1])
    rows = block.reshape(-1, *spec.row_shape)
    return decode_rows(spec, encode_rows(spec, rows)).reshape(block.shape)


def _values(
    choice: Choice, sample: JoinedSample, specs: Sequence[ArraySpec], facts: TeacherFacts
) -> np.ndarray:
    """What is compared, flat: the values, or what is known of the probabilities over the vocabulary."""
    if choice.target != "logits":
        blocks = [block for spec in specs for block in sample.arrays[spec.name]]
        return np.concatenate([np.empty(0), *(block.astype(np.float64).ravel() for block in blocks)])
    known = np.exp(_log_probs(sample, facts.vocab_size, missing=-np.inf))
    if (draws := sample.arrays.get("logits/draw_ids")) is not None:
        share = np.exp(sample.arrays["logits/tail"].astype(np.float64))[:, None] / draws.shape[1]
        np.add.at(known, (np.arange(len(known))[:, None], draws.astype(np.int64)), share)
    return known.ravel()


def _bytes(store: Store, samples: Sequence[JoinedSample], specs: Sequence[ArraySpec]) -> int:
    """What these arrays take on the disk, compressed, without metadata."""
    of_image, of_sample = ([s.name for s in specs if s.owner == owner] for owner in ("image", "sample"))
    with tempfile.TemporaryDirectory() as folder:
        manifest = replace(store.manifest, arrays=tuple(specs), planned_parts=("p",))
        with StoreWriter.open(Path(folder) / "s", manifest).part("p", source={}) as part:
            for sample in samples:
                entry = store.locate(sample.key)[1]
                for number, digest in enumerate(entry.images):
                    if not part.has_image(digest):
                        arrays = {n: sample.arrays[n][number][None] for n in of_image}
                        part.add_image(digest, arrays, tokens=entry.tokens[number], grid=entry.grids[number])
                part.add(entry, {name: sample.arrays[name] for name in of_sample})
            part.commit()
        return sum(sum(part.array_bytes.values()) for part in part_sizes(Path(folder) / "s"))


@app.command(help=__doc__.splitlines()[0])
def main(samples: int = 256, student: str = "", teacher_temperature: float = 1.0) -> None:
    config = load_config(Path("configs/demo.yaml"), [f"student.model={student}"] if student else [])
    rows = measure(config, num_samples=samples, temperature=teacher_temperature)
    print_table(rows, FORMATS, num_text_columns=3)


if __name__ == "__main__":
    app()
