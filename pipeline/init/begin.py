"""`alignkd init`: pack what is there, look at it through the models, write a config and say what to type next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.forms import CAPTIONS
from pipeline.errors import ConfigError
from pipeline.init.choose import (
    BATCH_SIZE,
    Epochs,
    Losses,
    Measured,
    epochs_for,
    has_gpu,
    in_words,
    losses_for,
    max_length_for,
    measure,
    preparation_for,
)
from pipeline.init.look import Found, look
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.packing.pack import pack
from pipeline.packing.sources import open_source

HELD_OUT_SHARDS = 10  # one of so many shards is kept for questions that the student never saw


@dataclass(frozen=True)
class Begun:
    """The config that was written, and the commands to type next."""

    config: Path
    commands: tuple[str, ...]


def begin(
    place: Path,
    output: Path,
    *,
    teacher: str,
    student: str | None = None,
    say: Callable[[str], None],
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Begun:
    """Write `config.yaml`, and shards if there are none, into `output`.

    Raises `ConfigError` or `PackError` for data that cannot be used, and if `output` holds a config already.
    """
    file = output / "config.yaml"
    if obstacle := next((at for at in (output, *output.parents) if at.exists() and not at.is_dir()), None):
        raise ConfigError(f"--output {output}: {obstacle} is a file; name a folder")
    if file.exists():
        raise ConfigError(f"{file} is there already; name another --output, or remove it to begin anew")
    found = look(place)
    model = read_config(checkpoint_folder(teacher))
    if student:
        read_config(checkpoint_folder(student))
    preparation = preparation_for(teacher, model)
    shards = list(found.shards) or _packed(found, output / "shards", say, progress)
    seen = measure(shards, preparation)
    max_length = max_length_for(seen, model)
    for line in _in_words(found, seen, len(shards), max_length):
        say(line)
    training, held_out = (shards[:-1], shards[-1:]) if len(shards) > 1 else (shards, [])
    settings: dict[str, Any] = {
        "output_dir": str(output / "run"),
        "teacher": {"model": teacher},
        "student": {"model": student or str(output / "student")},
        "data": {
            "shards": as_pattern(training),
            "template": preparation.template,
            "max_length": max_length,
        },
        "cache": {"path": str(output / "teacher.zarr")},
    }
    losses = losses_for(settings, seen, is_cut=student is None)
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(_text(settings, losses, seen, held_out, epochs_for(training)))
    layers = None if student else model.get_text_config().num_hidden_layers // 2
    return Begun(file, tuple(_commands(file, settings, layers=layers, held_out=bool(held_out))))


def _packed(
    found: Found, output: Path, say: Callable[[str], None], progress: Callable[[int, int | None], None]
) -> list[str]:
    """Pack the annotations into about ten shards or more, of which one can be held out."""
    assert found.annotations is not None
    number = sum(1 for _ in open_source(found.annotations).entries())
    size = min(1000, max(1, -(-number // HELD_OUT_SHARDS)))
    say(f"packing {number:,} entries of {found.annotations} into {output}, {size:,} a shard")
    summary = pack(
        found.annotations, output, image_folder=found.image_folder, samples_per_shard=size, progress=progress
    )
    if not summary.packed:
        raise ConfigError(f"nothing of {found.annotations} can be used; see {output / 'rejects.jsonl'}")
    if summary.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.rejects_by_reason.items())
        where = output / "rejects.jsonl"
        say(f"{summary.rejected:,} of {summary.seen:,} entries are left out: {reasons}; see {where}")
    return [str(output / name) for name in summary.shards]


def _in_words(found: Found, seen: Measured, num_shards: int, max_length: int) -> Iterator[str]:
    if found.annotations:
        yield f"annotations  {found.annotations}, in the form of `{found.form}`; images below {found.image_folder}"
    if found.form in CAPTIONS:
        yield "questions    none: the image alone is what the model is asked, and its caption is the answer"
    yield f"shards       {num_shards}; samples looked at: {seen.samples}"
    yield f"images       {in_words(seen.widths)} pixels wide, {in_words(seen.heights)} high"
    yield f"tokens       {in_words(seen.lengths)} a sample, of which vision {in_words(seen.vision_tokens)} an image"
    yield f"answers      {in_words(seen.answers)} tokens"
    if too_long := sum(length > max_length for length in seen.lengths):
        yield f"too long     {too_long} of {seen.samples}: the teacher reads {max_length:,} tokens; they are left out"
    if seen.rejected:
        yield f"unusable     {', '.join(f'{count} {reason}' for reason, count in seen.rejected.items())}"


def _commands(file: Path, settings: dict[str, Any], *, layers: int | None, held_out: bool) -> Iterator[str]:
    """Yield what to type next; `layers` are kept for a student that is cut from the teacher."""
    teacher, student = (shlex.quote(settings[name]["model"]) for name in ("teacher", "student"))
    config = shlex.quote(str(file))
    if layers is not None:
        yield f"alignkd make-student {teacher} {student} --layers 0-{layers - 1}"
    yield f"alignkd models check {teacher}"
    yield f"alignkd teacher-cache --config {config}"
    yield f"alignkd distill --config {config}"
    if held_out:
        yield f"alignkd evaluate --config {config}"
    yield f"alignkd report {shlex.quote(settings['output_dir'])}"


def _text(
    settings: dict[str, Any], losses: Losses, seen: Measured, held_out: list[str], epochs: Epochs
) -> str:
    """Return the YAML of a config, with the reason of each choice."""
    data, length = settings["data"], settings["data"]["max_length"]
    note = f"\n# Left out, because: {losses.note}" if losses.note else ""
    evaluate = (
        ""
        if not held_out
        else f"""
# The last shard is kept for questions that the student never saw; a shard holds all samples of its images.
evaluate:
  shards: {_flow(as_pattern(held_out))}
  max_new_tokens: {max(seen.answers) + 8} # the longest answer that was looked at has {max(seen.answers)} tokens

baseline: true # also train the same student on labels alone, and compare: what is the teacher worth?
"""
    )
    return f"""\
# Written by `alignkd init` from {seen.samples} samples. docs/config.md explains every key.
output_dir: {_flow(settings["output_dir"])}

teacher:
  model: {_flow(settings["teacher"]["model"])}

student:
  model: {_flow(settings["student"]["model"])}

data:
  shards: {_flow(data["shards"])}
  template: {data["template"]} # the one that fits the teacher's tokenizer
  # Samples were {in_words(seen.lengths)} tokens long, vision tokens included; longer ones than this are left out.
  max_length: {length}

cache:
  path: {_flow(settings["cache"]["path"])}

# What stage 1 keeps of the teacher.
targets:
{_section(losses.targets)}

# What stage 2 compares. These weights worked in our studies of small models; they are not tuned on your data.{note}
losses:
{_section(losses.losses)}
{evaluate}
# Common starting points, not tuned.
train:
  seed: 0
  num_train_epochs: {epochs.number} # {epochs.reason}
  per_device_train_batch_size: {BATCH_SIZE}
  learning_rate: 1.0e-4
  lr_scheduler_type: cosine
  warmup_steps: 0.03 # a value below 1 is a share of all steps
  bf16: {"true" if has_gpu() else "false"} # {"a GPU" if has_gpu() else "no GPU"} was found
  logging_steps: 0.01 # of all steps
  save_strategy: "no"
  report_to: none # or tensorboard
"""


def as_pattern(shards: list[str]) -> str | list[str]:
    """Return shards as one path, or one range such as shard-{000000..000008}.tar, where they are one."""
    if len(shards) == 1:
        return shards[0]
    first, last = (re.fullmatch(r"(.*?)(\d+)\.tar", shard) for shard in (shards[0], shards[-1]))
    if first and last and first[1] == last[1] and "{" not in first[1]:
        numbers = range(int(first[2]), int(last[2]) + 1)
        if shards == [f"{first[1]}{number:0{len(first[2])}d}.tar" for number in numbers]:
            return f"{first[1]}{{{first[2]}..{last[2]}}}.tar"
    return shards


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()  # which ends a scalar


def _section(values: dict[str, Any]) -> str:
    return "\n".join(f"  {name}: {_flow(value)}" for name, value in values.items())
