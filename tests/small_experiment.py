"""A whole experiment at the smallest size: images, conversations, shards, teacher, student, one config for all."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cache import Store, StoreWriter
from pipeline.config.config import Config, load_config, to_yaml
from pipeline.losses.losses import LOSSES
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.packing.pack import pack
from pipeline.studies.demo import write_tokenizer

COLOURS = ("red", "green", "blue", "brown", "black", "teal")
SHAPES = ("circle", "triangle", "rectangle", "line")
STUDENT_LOSSES = [name for name, row in LOSSES.items() if row.only != "twig"]
RARE = "zebra"  # said in the sample "rare" alone

Arrays = dict[str, Any]  # of one that depends on the images a list with the block of each image
Change = Callable[[str, Arrays], Arrays]


@dataclass(frozen=True)
class Experiment:
    """Where everything lies. Tests must not write into any of it; `store` holds all of `shards`."""

    file: Path
    teacher: Path
    student: Path
    shards: Path
    held_out: Path
    store: Path

    def config(self, output: Path, *overrides: str) -> Config:
        return load_config(self.file, [f"output_dir={output}", *overrides])

    def shard(self, number: int) -> Path:
        return self.shards / f"shard-{number:06d}.tar"


def build_experiment(folder: Path, tiny_model: Callable[..., MobileVLMForCausalLM]) -> Experiment:
    """Everything but the store, which stage 1 makes."""
    small = Experiment(
        file=folder / "config.yaml",
        teacher=folder / "teacher",
        student=folder / "student",
        shards=folder / "shards",
        held_out=folder / "held_out",
        store=folder / "teacher.zarr",
    )
    _write_models(small, tiny_model)
    images = folder / "images"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.png").write_bytes(picture(number))
    for records, output in ((training_records(), small.shards), (held_out_records(), small.held_out)):
        annotations = folder / f"{output.name}.json"
        annotations.write_text(json.dumps(records))
        pack(annotations, output, image_folder=images, samples_per_shard=5)
    small.file.write_text(to_yaml(Config.model_validate(_settings(small))))
    return small


def _write_models(small: Experiment, tiny_model: Callable[..., MobileVLMForCausalLM]) -> None:
    teacher = tiny_model(seed=1, vocab_size=512, num_key_value_heads=2)
    student = tiny_model(seed=2, vocab_size=512, hidden_size=24, num_hidden_layers=2)
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    for model, folder in ((teacher, small.teacher), (student, small.student)):
        model.save_pretrained(folder)
        write_tokenizer(folder, tokenizer_records())


def _settings(small: Experiment) -> dict[str, Any]:
    return {
        "output_dir": "to be overridden",
        "teacher": {"model": str(small.teacher), "batch_size": 3, "device": "cpu"},
        "student": {"model": str(small.student)},
        "data": {"shards": str(small.shards), "max_length": 200},
        "cache": {"path": str(small.store)},
        "targets": {
            "attention": {"layers": [0, 1], "heads": "each", "codec": "float32"},
            "vision": {"codec": "float32"},
            "logits": {"top_k": 8},
        },
        "losses": {
            "supervised": {},
            "attention": {"heads": "mix", "layers": [[0, 0], [1, 1]]},
            "vision_all": {},
            "vision_focus": {"k": 2},
            "logits": {},
        },
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        },
        "evaluate": {"shards": str(small.held_out), "max_new_tokens": 3, "batch_size": 4},
    }


def training_records() -> list[dict[str, Any]]:
    """Three shards: images used often and once, several of them, none at all, short and long texts."""
    records = [
        one("a0", 0, "What colour is the circle?", "blue"),
        one("a1", 0, "Is there a triangle in this image, or is there only a rectangle?", "no"),
        one("a2", 0, "What is in the image?", "a black circle and a line"),
        one("b0", 1, "Is it red?", "yes"),
        text("t0", "Which colours has a flag?", "red, green and black"),
        one("c0", 2, "Describe it.", "a brown line"),
        record("two", ["3.png", "4.png"], ["<image>\n<image>\nWhich of both is green?", "the first"]),
        record("late", ["5.png"], ["What do you know?", "much", "And of <image>?", "a teal shape"]),
        one("rare", 6, f"Is there a {RARE}?", "no"),
        text("t1", "Say no.", "no"),
        record("apart", ["0.png", "1.png"], ["First <image>, what is it?", "a circle", "<image>", "a line"]),
        one("d0", 7, "What shape is blue?", "circle"),
        one("d1", 7, "What shape is teal, if any?", "none of them"),
    ]
    return records


def held_out_records() -> list[dict[str, Any]]:
    """Questions of two types; two of one image, one of none."""
    return [
        one("h0", 0, "Is it blue?", "yes") | {"question_type": "yes/no"},
        one("h1", 0, "What colour is the line in the image?", "red") | {"question_type": "colour"},
        one("h2", 3, "What colour is it?", "green") | {"question_type": "colour"},
        text("h3", "Is red a colour?", "yes") | {"question_type": "yes/no"},
        record("h4", ["1.png", "2.png"], ["<image>\n<image>\nWhich is blue?", "the first"]),
        one("h5", 5, "Is it a circle, a triangle or a line?", "circle") | {"question_type": "shape"},
    ]


def tokenizer_records() -> list[dict[str, Any]]:
    """The text that the tokenizer is trained on."""
    return [*training_records(), *held_out_records(), *_filler()]


def one(name: str, image: int, question: str, answer: str) -> dict[str, Any]:
    return record(name, [f"{image}.png"], [f"<image>\n{question}", answer])


def text(name: str, question: str, answer: str) -> dict[str, Any]:
    return record(name, [], [question, answer])


def record(name: str, images: list[str], turns: list[str]) -> dict[str, Any]:
    """A LLaVA record: `image` is one name or a list."""
    roles = ("human", "gpt")
    conversations = [{"from": roles[n % 2], "value": value} for n, value in enumerate(turns)]
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {"id": name, **image, "conversations": conversations}


def _filler() -> Iterable[dict[str, Any]]:
    """Enough text to train 512 pieces on."""
    for colour in COLOURS:
        for shape in SHAPES:
            yield text("", f"Does the image not contain a {colour} {shape}?", f"The {shape} is {colour}.")
    yield text("", "The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs!")


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG of coarse noise, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """A tar of named members, as someone else may have made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_members(path: Path) -> list[tuple[str, bytes]]:
    """Every member of a tar, in order."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and bytes of every file below a folder."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in files
    }


def stored_arrays(store: Path) -> dict[str, Arrays]:
    """Every array of every sample of a store, by key."""
    opened = Store(store)
    return {key: opened.read(key, list(opened.manifest.specs)) for key in opened.keys()}  # noqa: SIM118


def rewrite_store(
    source: Path,
    target: Path,
    change: Change = lambda key, arrays: arrays,
    *,
    fingerprint: dict[str, str] | None = None,
    without: Collection[str] = (),
) -> Path:
    """A sound store that holds what `change` makes of each sample's own arrays, made with another `fingerprint`.

    The samples of the keys `without` are rejected.
    """
    old = Store(source)
    specs = old.manifest.specs
    of_image = [name for name, spec in specs.items() if spec.owner == "image"]
    stored = old.manifest
    manifest = replace(stored, fingerprint=replace(stored.fingerprint, **(fingerprint or {})))
    writer = StoreWriter.open(target, manifest)
    for name in old.parts:
        with writer.part(name, source={}) as part:
            for entry in old.entries(name):
                if entry.key in without:
                    part.reject(entry.key, "left out by a test")
                    continue
                arrays = old.read(entry.key, list(specs))
                for number, digest in enumerate(entry.images):
                    if not part.has_image(digest):
                        part.add_image(
                            digest,
                            {n: arrays[n][number][None] for n in of_image},
                            tokens=entry.tokens[number],
                            grid=entry.grids[number],
                        )
                part.add(entry, change(entry.key, {n: arrays[n] for n in specs if n not in of_image}))
            part.commit()
    return target


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return all that a training logged, in order."""
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def losses_of_steps(run: Path) -> list[dict[str, float]]:
    """Return the loss terms of every logged step, by name, and each one's share of the gradient if it was logged."""
    of_losses = ("loss/", "gradient_share/")
    steps = [{name: v for name, v in entry.items() if name.startswith(of_losses)} for entry in log_of(run)]
    return [step for step in steps if step]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def copy_of_teacher(experiment: Experiment, folder: Path) -> Path:
    """A teacher that a test may change."""
    return Path(shutil.copytree(experiment.teacher, folder))
