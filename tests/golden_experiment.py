"""A small experiment kept in tests/golden/experiment: a shard, the store made of it, and a run of stage 2.

    python tests/golden_experiment.py     writes it again; see tests/golden/README.md

All is written with relative paths, and the store with the default codecs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import chdir, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import small_experiment
import torch
from small_models import tiny_model

FOLDER = Path(__file__).parent / "golden" / "experiment"
EXPECTED_ARRAYS = "expected_arrays.npz"
EXPECTED = "expected.json"

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 7,
}
STUDENT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2}
PROMPT = "What colour is the circle?"

CONFIG = """\
output_dir: run
teacher: {model: teacher, device: cpu, batch_size: 2}
student: {model: student}
data: {shards: shards, max_length: 120}
cache: {path: store}
targets:
  attention: {layers: [0, 1], heads: each}
  vision: {}
  logits: {top_k: 8}
losses:
  supervised: {}
  attention: {heads: mix, layers: [[0, 0], [1, 1]]}
  vision_all: {}
  vision_focus: {k: 2}
  logits: {}
train:
  max_steps: 2
  per_device_train_batch_size: 2
  learning_rate: 0.001
  lr_scheduler_type: constant
  logging_steps: 1
  save_steps: 1
  use_cpu: true
  disable_tqdm: true
  report_to: none
"""


def write(folder: Path) -> None:
    """Run both stages in an empty folder, and keep what the tests read."""
    from pipeline.config.config import load_config
    from pipeline.distill.student import train_student
    from pipeline.packing.pack import pack
    from pipeline.teacher_cache.teacher import cache_teacher

    with chdir(folder), redirect_stderr(io.StringIO()):
        _write_models()
        Path("images").mkdir()
        for number in range(8):
            Path(f"images/{number}.png").write_bytes(small_experiment.picture(number))
        Path("records.json").write_text(json.dumps(_records()))
        pack(Path("records.json"), Path("shards"), image_folder=Path("images"))
        Path("config.yaml").write_text(CONFIG)
        config = load_config(Path("config.yaml"))
        cache_teacher(config)
        train_student(config, Path("run"))
        expected = {
            "store": store_facts(Path("store")),
            "losses": small_experiment.losses_of_steps(Path("run")),
            "generated": generate(Path("run/checkpoint-1")),
        }
        Path(EXPECTED).write_text(json.dumps(expected, indent=1) + "\n")
        np.savez_compressed(EXPECTED_ARRAYS, **stored_arrays(Path("store")))
    _keep_what_is_read(folder)


def store_facts(path: Path) -> dict[str, Any]:
    """Return what the store says of itself, JSON-ready."""
    from cache import Store, summarise

    store = Store(path)
    return {
        "fingerprint": store.manifest.fingerprint.to_json(),
        "arrays": {name: spec.codec for name, spec in store.manifest.specs.items()},
        "content": summarise(path).content,
        "keys": list(store.keys()),
        "rejected": [list(reject) for reject in store.rejects("shard-000000")],
    }


def stored_arrays(store: Path) -> dict[str, np.ndarray]:
    """Return the decoded arrays of every sample, named '<key>/<array>'."""
    samples = small_experiment.stored_arrays(store)
    return {f"{key}/{name}": array for key, arrays in samples.items() for name, array in arrays.items()}


def generate(checkpoint: Path) -> list[int]:
    """Return the ids of a greedy answer to a question about a picture."""
    from pipeline.config.config import load_config
    from pipeline.data.load_preparation import load_preparation
    from pipeline.data.preparation import pad_tokens
    from pipeline.models.loading import load_network
    from pipeline.models.vlm import VisionLanguageModel

    vlm = VisionLanguageModel(load_network(str(checkpoint), dtype=torch.float32).eval())
    preparation = load_preparation(
        str(checkpoint), load_config(checkpoint.parent.parent / "config.yaml").data
    )
    record = small_experiment.one("", 0, PROMPT, "")
    prompt = preparation.prompt(record["conversations"], [(0, 0)])
    features = vlm.encode([preparation.preprocess(small_experiment.picture(0))], prompt.sizes)
    answer = vlm.generate(
        pad_tokens([prompt], preparation.image_token_id), features, max_new_tokens=8, do_sample=False
    )
    return answer[0].tolist()


def _records() -> list[dict[str, Any]]:
    """One image, two, none, an image of two samples, and a text that is too long to keep."""
    kept = {"a0", "a1", "t0", "two", "late"}
    records = [record for record in small_experiment.training_records() if record["id"] in kept]
    return [*records, small_experiment.text("long", "Say a lot.", "a circle and a line and " * 20)]


def _write_models() -> None:
    teacher = tiny_model(seed=1, vocab_size=512, tower=TOWER, num_key_value_heads=2)
    student = tiny_model(seed=2, vocab_size=512, tower=TOWER, **STUDENT)
    for model, name in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(name)
        small_experiment.write_tokenizer(Path(name), small_experiment.tokenizer_records())


def _keep_what_is_read(folder: Path) -> None:
    """Remove what no test reads: the teacher, the sources of the shard, locks, the end of the run."""
    for name in ("teacher", "images", "run/checkpoint-2", "run/model"):
        shutil.rmtree(folder / name)
    kept = (
        "shards/*.tar",
        "store/*.json",
        "store/parts/**/*",
        "student/*",
        "run/checkpoint-1/*",
        "*.yaml",
        "*.npz",
    )
    kept_files = {file for pattern in (*kept, EXPECTED) for file in folder.glob(pattern)}
    for file in folder.rglob("*"):
        if file.is_file() and file not in kept_files:
            file.unlink()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parent.parent))
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(temporary, FOLDER)
