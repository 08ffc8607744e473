"""What each codec costs: bytes a sample against the error of a loss and of its gradient.

python bench/codecs.py                                     the demo's teacher and samples, with its store

Samples are captured once, unrounded; every codec then encodes, compresses and decodes them as the store would.
Errors of a loss are relative, at a student's first weights; `1 - cosine` is of the gradient in all of its parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import ArraySpec, Store, StoreWriter, part_sizes
from cache.codecs import decode_rows, encode_rows
from pipeline.check import captured_again, loss_terms
from pipeline.config import Config, load_config
from pipeline.dataset import JoinCollator, JoinedDataset, JoinedSample, teacher_facts
from pipeline.distiller import Distiller
from pipeline.losses import LOSSES
from pipeline.models.stub import load_teacher
from pipeline.student import load_student
from pipeline.targets import TARGETS
from pipeline.teacher import plan_capture

ROOT = Path(__file__).parent.parent
# Target -> settings of its arrays to be tried, the first of which loses nothing.
TRIED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "attention": [("float32", {}), ("float16", {}), ("sqrt_uint8", {}), ("fixed_point", {"step": 2.0**-12})],
    "vision": [
        ("float32", {}), ("float16", {}), ("fixed_point", {"step": 2.0**-8}), ("fixed_point", {"step": 2.0**-7}),
        ("fixed_point", {"step": 2.0**-6}), ("fixed_point", {"step": 2.0**-5}), ("int8", {}),
    ],
}  # fmt: skip
LOSS_OF = {"attention": "attention", "vision": "vision_all"}


def main() -> int:
    options = _options()
    config = load_config(options.config)
    rows = list(measure(config, num_samples=options.samples))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def measure(config: Config, *, num_samples: int) -> Iterator[dict[str, Any]]:
    """A row for each target and codec."""
    plan, store = plan_capture(config), Store(config.cache.path)
    targets = config.targets.cached()
    dataset = JoinedDataset(store, config.data.shards, plan.preparation, targets=targets)
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    stored = [dataset[number] for number in range(min(num_samples, len(dataset)))]
    live = [
        sample
        for n in range(0, len(stored), 8)
        for sample in captured_again(config, teacher, stored[n : n + 8])
    ]
    losses = {name: loss for name, loss in config.losses.active().items() if LOSSES[name].targets}
    torch.manual_seed(0)
    distiller = Distiller(load_student(config, store), losses, facts=teacher_facts(store)).float()
    exact = loss_terms(distiller, JoinCollator(targets), live)
    for target, tried in TRIED.items():
        if target not in targets or LOSS_OF[target] not in losses:
            continue
        specs = TARGETS[target].arrays(targets[target], plan.teacher.facts)
        for codec, codec_options in tried:
            coded = [replace(spec, codec=codec, options=codec_options) for spec in specs]
            lossy = [_through(sample, coded) for sample in live]
            value, gradient = loss_terms(distiller, JoinCollator(targets), lossy)[LOSS_OF[target]]
            of_exact, exact_gradient = exact[LOSS_OF[target]]
            cosine = torch.nn.functional.cosine_similarity(gradient.double(), exact_gradient.double(), dim=0)
            yield {
                "target": target,
                "codec": codec,
                "options": codec_options,
                "bytes_per_sample": _bytes(store, live, coded) / len(live),
                "loss_error": abs(value - of_exact) / abs(of_exact),
                "gradient": 1 - float(cosine),
            }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [("target", "codec", "bytes a sample", "loss error", "1 - cosine of gradient")]
    for row in rows:
        step = f" {row['options']['step']:g}" if row["options"] else ""
        lines.append((row["target"], row["codec"] + step, f"{row['bytes_per_sample']:,.0f}",
                      f"{row['loss_error']:.1e}", f"{max(row['gradient'], 0):.1e}"))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _through(sample: JoinedSample, specs: list[ArraySpec]) -> JoinedSample:
    """The sample as it comes back from these codecs."""
    coded = {spec.name: decode_rows(spec, encode_rows(spec, sample.arrays[spec.name])) for spec in specs}
    return replace(sample, arrays=sample.arrays | coded)


def _bytes(store: Store, samples: list[JoinedSample], specs: list[ArraySpec]) -> int:
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
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
