"""Stage 1 against the bare teacher forward, the obvious way, and its own stub, side by side.

python -m bench.stage1 --size small --tokens 300
python -m bench.stage1 --size wide --samples 4       (full widths in bfloat16, 8 layers of 32: two CPU cores, 20 GB)
python -m bench.stage1 --size full --tokens 300      (a GPU with 40 GB, about 8 minutes)
python -m bench.stage1 --profiled "stage 1"          (where a turn of one contestant goes, by torch's profiler)

`bare`     tower, projector, decoder with SDPA, and the head where answers are: nothing decoded, kept or written
`stage 1`  shard to part: images decoded, all targets captured, encoded, compressed, written, forced to the disk
`stub`     the same for attention and vision alone, which need the first layer only
`compiled` the forward of `bare`, its decoder by torch.compile
`obvious`  eager attention with `output_attentions=True`, layer 0 kept, all logits, one torch.save a batch
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.models import TARGETS, Case, config_of, write_inputs
from bench.turns import Work, stage_app
from cache import StoreWriter
from pipeline.data.preparation import pad_tokens
from pipeline.data.shards import Sample, read_shard
from pipeline.models.processors import Tensors
from pipeline.models.stub import Teacher, load_teacher
from pipeline.teacher_cache.capture import Capture
from pipeline.teacher_cache.progress import Progress
from pipeline.teacher_cache.teacher import CapturePlan, plan_capture

Batch = tuple[dict[str, Any], list[Tensors]]  # of `pad_tokens`, and the pixel inputs of its images


def capturing(case: Case, *, targets: Collection[str] = tuple(TARGETS)) -> Work:
    """The shard to its part; every turn begins without a store."""
    plan, teacher = _load(case, targets, store=f"store of {len(targets)} targets")
    path = Path(plan.config.one_cache.path)

    def turn() -> Mapping[str, float]:
        shutil.rmtree(path, ignore_errors=True)
        store = StoreWriter.open(path, plan.manifest)
        with Progress(plan.shards, description="bench") as progress:
            capture = Capture(plan.config, teacher, plan.preparation, progress)
            capture.run(store, plan.shards[0]).commit(capture)
        return {}

    return turn


def _load(case: Case, targets: Collection[str], store: str = "store") -> tuple[CapturePlan, Teacher]:
    plan = plan_capture(config_of(case, targets=targets, store=store))
    return plan, load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)


def batches(case: Case) -> tuple[Teacher, list[Batch]]:
    """A teacher, and the batches of stage 1 with their images preprocessed: nothing is left but to compute."""
    plan, teacher = _load(case, ["logits"])
    samples = [
        (plan.preparation.tokenize(item.conversations), plan.preparation.preprocess(item.images[0]))
        for item in read_shard(plan.shards[0])
        if isinstance(item, Sample)
    ]
    samples.sort(key=lambda sample: len(sample[0].input_ids), reverse=True)
    starts = range(0, len(samples), case.batch_size)
    cut = (zip(*samples[start : start + case.batch_size], strict=True) for start in starts)
    image_token_id = plan.preparation.image_token_id
    return teacher, [(pad_tokens(tokens, image_token_id), list(pixels)) for tokens, pixels in cut]


def bare(case: Case, *, compiled: bool = False) -> Work:
    """The whole teacher's forward."""
    teacher, prepared = batches(case)
    if compiled:
        teacher.vlm.decoder.set_attn_implementation("sdpa")  # the tap breaks graphs
        teacher.vlm.decoder.compile(dynamic=True)

    def turn() -> Mapping[str, float]:
        for batch, images in prepared:
            sizes = [size for of_sample in batch["sizes"] for size in of_sample]
            teacher.forward(batch, teacher.encode_images(images, sizes))
        return {}

    return turn


def obvious(case: Case) -> Work:
    """What one would write first."""
    teacher, prepared = batches(case)
    network: Any = teacher.vlm.network
    network.set_attn_implementation("eager")

    @torch.no_grad()
    def turn() -> Mapping[str, float]:
        for batch, images in prepared:
            pixels = torch.cat([image["pixel_values"] for image in images])
            vision = network.get_image_features(pixels.to(teacher.device))
            outputs = network(
                batch["input_ids"].to(teacher.device),
                batch["attention_mask"].to(teacher.device),
                mm_encoder_outputs={"image": vision},
                output_attentions=True,
                use_cache=False,
            )
            found = {
                "attention": outputs.attentions[0],
                "vision": vision.pooler_output,
                "logits": outputs.logits,
            }
            torch.save(
                {name: value.half().cpu() for name, value in found.items()}, case.folder / "obvious.pt"
            )
        return {}

    return turn


CONTESTANTS = {
    "bare": bare,
    "stage 1": capturing,
    "stub": partial(capturing, targets=("attention", "vision")),
    "obvious": obvious,
    "compiled": partial(bare, compiled=True),
}
app = stage_app(__doc__.splitlines()[0], CONTESTANTS, lambda case: write_inputs(case, "teacher"))

if __name__ == "__main__":
    app()
