"""docs/python.md and docs/store.md: the loop is stage 2, the shapes are right, and what is public is described."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_experiment import Experiment, held_out_records, log_of, weights
from torch.utils.data import DataLoader
from watched import results_of

import cache
import pipeline
from cache import Store
from pipeline import Distiller, JoinError, build_distiller, load_student, open_dataset
from pipeline.config.config import to_yaml
from pipeline.distill.student import train_student
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.losses.inputs import TeacherTargets

ROOT = Path(__file__).parent.parent
PYTHON, STORE = ((ROOT / "docs" / name).read_text() for name in ("python.md", "store.md"))
AS_IN_THE_LOOP = ["train.max_steps=-1", "train.num_train_epochs=1", "train.per_device_train_batch_size=4",
                  "train.learning_rate=1e-3", "train.optim=adamw_torch", "train.max_grad_norm=0"]  # fmt: skip


def blocks(page: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)]


def named_in_tables(page: str) -> set[str]:
    """The words in code in the first cells of the page's tables."""
    cells = " ".join(re.findall(r"^\| (.*?) \|", page, re.M))
    return {re.split(r"[(.]", code)[0] for code in re.findall(r"`([^`]+)`", cells)}


# What is public


@pytest.mark.parametrize(("package", "page"), [(pipeline, PYTHON), (cache, STORE)], ids=["pipeline", "cache"])
def test_all_that_is_public_can_be_imported_and_is_on_its_page(package: Any, page: str):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in named_in_tables(page), name


def test_a_name_that_is_not_public_is_answered_with_those_that_are():
    with pytest.raises(AttributeError, match=r"has no 'open_data'; it gives Config, ConfigError, "):
        pipeline.open_data  # noqa: B018


@pytest.mark.parametrize("package", ["pipeline", "cache"])
def test_importing_a_package_does_not_import_torch(package: str):
    asked = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT).returncode == 0


# The loop


@pytest.fixture
def place(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the `config.yaml` of an experiment whose store is written."""
    config = experiment.config(tmp_path, *AS_IN_THE_LOOP)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_loop_makes_the_steps_of_alignkd_distill(place: Path, experiment: Experiment):
    names: dict[str, Any] = {}
    with results_of(Distiller) as of_loop:
        for block in blocks(PYTHON):
            exec(compile(block, "docs/python.md", "exec"), names)
    config = names["config"]
    with results_of(Distiller) as of_trainer:
        model = train_student(config, place / "run")
    assert len(of_loop) == len(of_trainer) == 4
    for step, (mine, theirs) in enumerate(zip(of_loop, of_trainer, strict=True)):
        rtol, atol = (0, 0) if step == 0 else (1e-5, 1e-6)
        for name in config.losses.active():
            torch.testing.assert_close(
                mine[name], theirs[name], rtol=rtol, atol=atol, msg=f"{name} at step {step}"
            )
    logged = [entry["loss"] for entry in log_of(place / "run") if "loss" in entry]
    total = names["distiller"].total
    assert [float(total(terms).detach()) for terms in of_loop] == pytest.approx(logged, rel=1e-5)
    mine, theirs = weights(place / "trained"), weights(model)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
    assert len(evaluate_checkpoint(config, str(place / "trained"))) == len(held_out_records())


def test_a_batch_has_what_the_page_says(experiment: Experiment, tmp_path: Path):
    config = experiment.config(tmp_path)
    dataset, collate = open_dataset(config)
    batch = next(iter(DataLoader(dataset, batch_size=13, collate_fn=collate)))
    assert batch.keys() <= named_in_tables(PYTHON)
    assert set(TeacherTargets.__dataclass_fields__) <= named_in_tables(PYTHON)
    (num, length), sizes = batch["input_ids"].shape, batch["sizes"]
    assert {batch[name].shape for name in ("attention_mask", "labels", "is_vision")} == {(num, length)}
    answers = int((batch["labels"][:, 1:] != -100).sum())
    tokens, most = sum(map(sum, sizes)), max(map(sum, sizes))
    targets = batch["targets"]
    assert targets["attention"][0].shape[0::3] == (num, most) and targets["attention"][0].shape[1] == 4
    assert targets["vision"].shape == (tokens, 32)
    assert targets["top_ids"].shape == targets["top_log_probs"].shape == (answers, 8)
    assert targets["tail_log_prob"].shape == (answers,)
    assert len(batch["images"]) == len(batch["image_digests"]) == sum(map(len, sizes))
    terms = build_distiller(config, load_student(config), dataset)(batch)
    assert {part.shape for pair in terms.values() for part in pair} == {()}


def test_a_sample_that_a_worker_could_not_read_stops_the_loop(experiment: Experiment, tmp_path: Path):
    config = experiment.config(tmp_path)
    dataset, _ = open_dataset(config)
    distiller = build_distiller(config, load_student(config), dataset)
    with pytest.raises(JoinError, match="its reason"):
        distiller({"refused": "its reason"})


def test_a_config_with_adapters_puts_them_into_the_student(experiment: Experiment, tmp_path: Path):
    config = experiment.config(tmp_path, "student.lora.rank=2")
    dataset, _ = open_dataset(config)
    student = load_student(config)
    build_distiller(config, student, dataset)
    trained = [name for name, value in student.named_parameters() if value.requires_grad]
    assert any(".lora_" in name for name in trained) and not any("embed_tokens" in name for name in trained)


# The store


def test_the_store_gives_what_its_page_says(experiment: Experiment):
    store = Store(experiment.store)
    described = named_in_tables(STORE)
    assert all(re.sub(r"layer_\d+", "layer_L", name) in described for name in store.manifest.specs)
    for key in ("a0", "two", "t0"):
        arrays, entry = store.read(key, list(store.manifest.specs)), store.locate(key)[1]
        num_answers = int((arrays["labels"][1:] != -100).sum())
        num_tokens = len(arrays["input_ids"])
        assert arrays["input_ids"].shape == arrays["labels"].shape == (num_tokens,)
        for name in ("attention/layer_0", "vision"):
            assert isinstance(arrays[name], list) and len(arrays[name]) == len(entry.images)
        for n, tokens in enumerate(entry.tokens):
            assert arrays["attention/layer_0"][n].shape[1:] == (4, tokens)
            assert arrays["vision"][n].shape == (32, tokens)
        assert arrays["logits/ids"].shape == arrays["logits/log_probs"].shape == (num_answers, 8)
        assert arrays["logits/tail"].shape == (num_answers,)
        kinds = {array.dtype for array in arrays.values() if not isinstance(array, list)}
        assert all(kind == np.float32 or np.issubdtype(kind, np.integer) for kind in kinds)
