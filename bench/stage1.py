"""Stage 1 against the bare teacher forward, the obvious way, and its own stub, side by side.

python bench/stage1.py --size small --tokens 300
python bench/stage1.py --size wide --samples 4       (full widths in bfloat16, 8 layers of 32: two CPU cores, 20 GB)
python bench/stage1.py --size full --tokens 300      (a GPU with 40 GB, about 8 minutes)
python bench/stage1.py --profile "stage 1"           (where a turn of one contestant goes, by torch's profiler)

`bare`     tower, projector, decoder with SDPA, and the head where answers are: nothing decoded, kept or written
`stage 1`  shard to part: images decoded, all targets captured, encoded, compressed, written, forced to the disk
`stub`     the same for attention and vision alone, which need the first layer only
`obvious`  eager attention with `output_attentions=True`, layer 0 kept, all logits, one torch.save a batch
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from side_by_side import Work
from stage_bench import Bench

TARGETS = {"attention": {"layers": [0]}, "vision": {}, "logits": {"top_k": 32}}


def prepare(options: argparse.Namespace) -> None:
    """The model, and a shard."""
    from random_models import write_model, write_shard

    folder = Path(options.folder)
    if not (folder / "teacher").exists():
        write_model(folder / "teacher", options.size, "teacher")
    if not (folder / "data").exists():
        write_shard(folder / "data", samples=options.samples, tokens=options.tokens)


def config_of(options: argparse.Namespace, targets: Mapping[str, Any], *, store: str | None = None) -> Any:
    """Stage 1's, with a store of this process's own unless one is named."""
    from random_models import compute_dtype

    from pipeline.config.config import Config

    folder = Path(options.folder)
    return Config.model_validate({
        "output_dir": str(folder / "out"),
        "teacher": {
            "model": str(folder / "teacher"),
            "batch_size": options.batch_size,
            "dtype": compute_dtype(options.size),
        },
        "student": {"model": str(folder / "teacher")},
        "data": {"shards": str(folder / "data" / "shards")},
        "cache": {"path": str(folder / (store or f"store-{os.getpid()}"))},
        "targets": targets,
    })  # fmt: skip


def _capturing(options: argparse.Namespace, targets: Mapping[str, Any]) -> Work:
    from cache import StoreWriter
    from pipeline.models.stub import load_teacher
    from pipeline.teacher_cache.capture import Capture
    from pipeline.teacher_cache.progress import Progress
    from pipeline.teacher_cache.teacher import plan_capture

    plan = plan_capture(config_of(options, targets))
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    path = Path(plan.config.one_cache.path)

    def turn() -> Mapping[str, float]:
        shutil.rmtree(path, ignore_errors=True)
        store = StoreWriter.open(path, plan.manifest)
        with Progress(plan.shards, description="bench") as progress:
            capture = Capture(plan.config, teacher, plan.preparation, progress)
            summary = capture.run(store, plan.shards[0]).commit(capture)
        return {"samples": summary.cached, "bytes": sum(summary.array_bytes.values())}

    return turn


def _batches(options: argparse.Namespace, targets: Mapping[str, Any]) -> Any:
    """The whole teacher, and stage 1's own batches with their images preprocessed: nothing left but to compute."""
    import torch

    from pipeline.data.preparation import pad_tokens
    from pipeline.data.shards import read_shard
    from pipeline.models.stub import load_teacher
    from pipeline.teacher_cache.longest_first import Prepared, longest_first
    from pipeline.teacher_cache.teacher import plan_capture

    plan = plan_capture(config_of(options, targets))
    teacher = load_teacher(plan.teacher, dtype=plan.dtype, device=plan.device)
    prepared, images = [], {}
    for place, sample in enumerate(read_shard(plan.shards[0])):
        tokens = plan.preparation.tokenize(sample.conversations)  # type: ignore[union-attr]
        images[place] = plan.preparation.preprocess(sample.images[0])  # type: ignore[union-attr]
        length = plan.preparation.merged_length(tokens.input_ids)
        prepared.append(Prepared(place, sample, tokens, length))  # type: ignore[arg-type]
    ordered, size = longest_first(prepared), options.batch_size
    chunks = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return teacher, [
        (pad_tokens([item.tokens for item in chunk]), torch.stack([images[item.place] for item in chunk]))
        for chunk in chunks
    ]


def _bare(options: argparse.Namespace) -> Work:
    teacher, batches = _batches(options, {"logits": {"top_k": 32}})

    def turn() -> Mapping[str, float]:
        for tokens, pixels in batches:
            teacher.forward(**tokens, vision=teacher.encode_images(pixels))
        return {"samples": sum(len(pixels) for _, pixels in batches)}

    return turn


def _obvious(options: argparse.Namespace) -> Work:
    import torch

    teacher, batches = _batches(options, {"logits": {"top_k": 32}})
    model, device = teacher.model, teacher.device
    model.set_attn_implementation("eager")
    kept = Path(options.folder) / f"obvious-{os.getpid()}.pt"

    @torch.no_grad()
    def turn() -> Mapping[str, float]:
        size = 0
        for tokens, pixels in batches:
            tokens = {name: value.to(device) for name, value in tokens.items()}
            vision = model.encode_images(pixels.to(device))
            merged = model.merge_inputs(
                tokens["input_ids"], vision, attention_mask=tokens["attention_mask"], labels=tokens["labels"]
            )
            outputs = model.model(
                inputs_embeds=merged.inputs_embeds,
                attention_mask=merged.attention_mask.long(),
                output_attentions=True,
                use_cache=False,
            )
            logits = model.lm_head(outputs.last_hidden_state)
            found = {"attention": outputs.attentions[0], "vision": vision, "logits": logits}
            torch.save({name: value.half().cpu() for name, value in found.items()}, kept)
            size += kept.stat().st_size
        return {"samples": sum(len(pixels) for _, pixels in batches), "bytes": size}

    return turn


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Work]] = {
    "bare": _bare,
    "stage 1": lambda options: _capturing(options, TARGETS),
    "stub": lambda options: _capturing(options, {name: TARGETS[name] for name in ("attention", "vision")}),
    "obvious": _obvious,
}


if __name__ == "__main__":
    sys.exit(Bench(__file__, __doc__ or "", CONTESTANTS, against="bare", prepare=prepare).main())
