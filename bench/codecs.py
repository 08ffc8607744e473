"""What each choice of storing a target costs: bytes a sample against the error of values, losses and gradients.

python bench/codecs.py                                       the demo's teacher and samples, with its store
python bench/codecs.py --student runs/demo/align_kd          the same at a trained student's weights
python bench/codecs.py --teacher-temperature 4               as if the teacher were less certain of its answers
python bench/codecs.py --quick                               a few samples

Samples are captured once, unrounded and with the whole vocabulary; every choice then keeps, encodes, compresses and
decodes them as the store would. Errors are relative to what is unrounded. `1 - cosine` is of the loss's gradient in
all parameters of the student, summed over the samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cache import ArraySpec, Store, StoreWriter, part_sizes
from cache.format.codecs import decode_rows, encode_rows
from pipeline.config.config import Config, load_config
from pipeline.distill.join.dataset import JoinCollator, JoinedDataset, JoinedSample, teacher_facts
from pipeline.distill.model.distiller import Distiller
from pipeline.distill.student import load_student
from pipeline.losses.losses import LogitsLoss
from pipeline.models.stub import load_teacher
from pipeline.positions import Slots
from pipeline.targets.targets import TARGETS, LogitsTarget, TeacherFacts, TeacherForward
from pipeline.teacher_cache.teacher import plan_capture
from pipeline.upkeep.check import captured_again, loss_terms

QUICK_SAMPLES = 16
# Target -> codecs and steps to be tried, the first of which loses nothing.
CODED: dict[str, list[tuple[str, int | None]]] = {
    "attention": [
        ("float32", None), ("float16", None), ("sqrt_uint8", None),
        ("fixed_point", -13), ("fixed_point", -12), ("fixed_point", -11), ("fixed_point", -10),
    ],
    "vision": [
        ("float32", None), ("float16", None),
        ("fixed_point", -8), ("fixed_point", -7), ("fixed_point", -6), ("fixed_point", -5), ("fixed_point", -4),
        ("int8", None),
    ],
}  # fmt: skip
LOSS_OF = {"attention": "attention", "vision": "vision_all"}
TOP_K = (8, 16, 32, 50, 128)
DRAWS = ((8, 16), (8, 50), (16, 16), (16, 50))  # top K and draws from the rest


@dataclass(frozen=True)
class Choice:
    """A way to store a target, and the loss that tells what it costs. `is_exact`: what others are compared with."""

    target: str
    name: str
    settings: Any
    loss: str
    loss_settings: Any
    is_exact: bool = False


def main() -> int:
    options = _options()
    overrides = [f"student.model={options.student}"] if options.student else []
    samples = QUICK_SAMPLES if options.quick else options.samples
    config = load_config(options.config, overrides)
    rows = list(measure(config, num_samples=samples, temperature=options.teacher_temperature))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def choices(config: Config, facts: TeacherFacts) -> Iterator[Choice]:
    """Of the targets and losses that the config has; logits by forward KL over the vocabulary, and reverse."""
    targets, losses = config.targets.cached(), config.losses.active()
    for target, tried in CODED.items():
        if target in targets and (loss := LOSS_OF[target]) in losses:
            for number, (codec, power) in enumerate(tried):
                changes = {"codec": codec} | ({} if power is None else {"step": 2.0**power})
                settings = targets[target].model_copy(update=changes)
                name = codec if power is None else f"{codec} 2^{power}"
                yield Choice(target, name, settings, loss, losses[loss], is_exact=number == 0)
    if "logits" in targets:
        for direction in ("forward", "reverse"):
            yield from _logits_choices(direction, facts.vocab_size)


def _logits_choices(direction: Any, vocab_size: int) -> Iterator[Choice]:
    loss = LogitsLoss(direction=direction)
    whole = LogitsTarget(top_k=vocab_size)
    yield Choice("logits", "whole vocabulary", whole, "logits", loss, is_exact=True)
    for top_k in TOP_K:
        if top_k < vocab_size:
            yield Choice("logits", f"top {top_k} + bucket", LogitsTarget(top_k=top_k), "logits", loss)
    for top_k, draws in DRAWS if direction == "forward" else ():
        settings = LogitsTarget(top_k=top_k, tail_samples=draws)
        yield Choice("logits", f"top {top_k} + {draws} draws", settings, "logits", loss)


def measure(config: Config, *, num_samples: int, temperature: float = 1.0) -> Iterator[dict[str, Any]]:
    """A row for each choice. Raises what stage 2 raises of a store that is not the config's."""
    plan, store = plan_capture(config), Store(config.one_cache.path)
    facts = plan.teacher.facts
    live = _live_samples(config, store, plan, num_samples)
    live = [_tempered(sample, temperature) for sample in live]
    student = load_student(config, store)

    @cache
    def distiller(loss: str, settings: str) -> Distiller:
        torch.manual_seed(0)
        return Distiller(student, {loss: of_loss[settings]}, facts=teacher_facts(store)).float()

    of_loss: dict[str, Any] = {}
    exact: tuple[list[JoinedSample], float, torch.Tensor] | None = None
    for choice in choices(config, facts):
        of_loss[str(choice.loss_settings)] = choice.loss_settings
        specs = TARGETS[choice.target].arrays(choice.settings, facts)
        kept = [_kept(choice, sample, facts) for sample in live]
        coded = kept if choice.is_exact else [_through(sample, specs) for sample in kept]
        terms = loss_terms(
            distiller(choice.loss, str(choice.loss_settings)),
            JoinCollator({choice.target: choice.settings}),
            coded,
        )
        value, gradient = terms[choice.loss]
        if choice.is_exact:
            exact = (kept, value, gradient)
        assert exact is not None
        yield {
            "target": choice.target,
            "choice": choice.name,
            "loss": choice.loss if choice.loss != "logits" else f"logits {choice.loss_settings.direction}",
            "bytes_per_sample": _bytes(store, kept, specs) / len(kept),
            "relative_rms_error": _relative_rms(choice, specs, coded, exact[0], facts),
            "loss_error": abs(value - exact[1]) / abs(exact[1]),
            "gradient": 1 - _cosine(gradient, exact[2]),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one loss after the other."""
    heads = (
        "target",
        "stored as",
        "loss",
        "bytes a sample",
        "values",
        "loss error",
        "1 - cosine of gradient",
    )
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        figures = (row["relative_rms_error"], row["loss_error"], max(row["gradient"], 0))
        lines.append((row["target"], row["choice"], row["loss"], f"{row['bytes_per_sample']:,.0f}",
                      *(f"{figure:.1e}" for figure in figures)))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _live_samples(config: Config, store: Store, plan: Any, num_samples: int) -> list[JoinedSample]:
    """As the teacher says them now, unrounded; logits over the whole vocabulary."""
    dataset = JoinedDataset(store, config.data.shards, plan.preparation, targets=config.targets.cached())
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    whole = LogitsTarget(top_k=plan.teacher.facts.vocab_size)
    has_logits = "logits" in config.targets.active()
    targets = config.targets.model_copy(update={"logits": whole} if has_logits else {})
    config = config.model_copy(update={"targets": targets})
    stored = [dataset[number] for number in range(min(num_samples, len(dataset)))]
    return [
        sample
        for n in range(0, len(stored), 8)
        for sample in captured_again(config, teacher, stored[n : n + 8])
    ]


def _tempered(sample: JoinedSample, temperature: float) -> JoinedSample:
    """The sample with its teacher's answers flattened; what a log probability lacks of 0 in sum, capturing adds."""
    if "logits/log_probs" not in sample.arrays:
        return sample
    log_probs = sample.arrays["logits/log_probs"] / np.float32(temperature)
    return replace(sample, arrays=sample.arrays | {"logits/log_probs": log_probs})


def _kept(choice: Choice, sample: JoinedSample, facts: TeacherFacts) -> JoinedSample:
    """The sample with what stage 1 would keep of it, before encoding: for logits its own function says so."""
    if choice.target != "logits":
        return sample
    capture = TARGETS["logits"].capture
    assert capture is not None
    log_probs = torch.from_numpy(_distribution(sample, facts.vocab_size)).float()
    none = torch.zeros(1, 0, dtype=torch.long)
    forward = TeacherForward(Slots(none, none), {}, log_probs, [len(log_probs)], 0, keys=[sample.key])
    [arrays] = capture(choice.settings, forward)
    others = {name: array for name, array in sample.arrays.items() if not name.startswith("logits/")}
    return replace(sample, arrays=others | arrays)


def _distribution(sample: JoinedSample, vocab_size: int, *, missing: float = -30.0) -> np.ndarray:
    """Log probabilities 'P V' of the sample's top K; `missing` elsewhere."""
    ids = sample.arrays["logits/ids"].astype(np.int64)
    log_probs = np.full((len(ids), vocab_size), missing)
    np.put_along_axis(log_probs, ids, sample.arrays["logits/log_probs"].astype(np.float64), axis=1)
    return log_probs


def _probabilities(sample: JoinedSample, vocab_size: int) -> np.ndarray:
    """What is known of a distribution: 0 outside the top K, or the draws' shares of what is there."""
    known = np.exp(_distribution(sample, vocab_size, missing=-np.inf))
    if (draws := sample.arrays.get("logits/draw_ids")) is not None:
        share = np.exp(sample.arrays["logits/tail"].astype(np.float64))[:, None] / draws.shape[1]
        np.add.at(known, (np.arange(len(known))[:, None], draws.astype(np.int64)), share)
    return known


def _through(sample: JoinedSample, specs: Sequence[ArraySpec]) -> JoinedSample:
    """The sample as it comes back from these codecs."""
    coded = {spec.name: decode_rows(spec, encode_rows(spec, sample.arrays[spec.name])) for spec in specs}
    return replace(sample, arrays=sample.arrays | coded)


def _relative_rms(
    choice: Choice,
    specs: Sequence[ArraySpec],
    coded: list[JoinedSample],
    exact: list[JoinedSample],
    facts: TeacherFacts,
) -> float:
    """Root mean square error over root mean square, of values, or of probabilities over the vocabulary."""

    def values(sample: JoinedSample) -> np.ndarray:
        if choice.target == "logits":
            return _probabilities(sample, facts.vocab_size).ravel()
        return np.concatenate([sample.arrays[spec.name].astype(np.float64).ravel() for spec in specs])

    found, wanted = (np.concatenate([values(sample) for sample in samples]) for samples in (coded, exact))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _cosine(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(gradient.double(), exact.double(), dim=0))


def _bytes(store: Store, samples: list[JoinedSample], specs: Sequence[ArraySpec]) -> int:
    """What these arrays take on the disk, compressed, without metadata."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = replace(store.manifest, arrays=tuple(specs), planned_parts=("p",))
        with StoreWriter.open(Path(folder) / "s", manifest).part("p", source={}) as part:
            for sample in samples:
                entry = store.locate(sample.key)[1]
                of_image = [spec.name for spec in specs if spec.owner == "image"]
                for number, digest in enumerate(entry.images):
                    if not part.has_image(digest):
                        arrays = {name: sample.arrays[name][number : number + 1] for name in of_image}
                        part.add_image(digest, arrays)
                part.add(
                    entry, {s.name: np.asarray(sample.arrays[s.name]) for s in specs if s.owner == "sample"}
                )
            part.commit()
        return sum(sum(part.array_bytes.values()) for part in part_sizes(Path(folder) / "s"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument(
        "--student", help="a student to take losses at, instead of the config's first weights"
    )
    parser.add_argument(
        "--teacher-temperature", type=float, default=1.0, help="flattens the teacher's answers"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SAMPLES} samples")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
