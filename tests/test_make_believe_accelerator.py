"""Both stages on a make-believe accelerator: the numbers of the CPU, and no operation that mixes devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from family_experiment import write_config
from make_believe_accelerator import DEVICE, MixedDevicesError, Worker
from small_experiment import losses_of_steps, rewrite_store, stored_arrays, weights
from torch import nn

from pipeline.config.config import Config, load_config
from pipeline.distill.student import train_student, training_arguments
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.teacher_cache.teacher import cache_teacher

TWO_EPOCHS = ["train.max_steps=-1", "train.num_train_epochs=2"]
RECOMPUTED = ["targets.attention.source=recompute", "targets.vision.source=recompute"]
FEATURES_HELD = ["student.patch_feature_cache_bytes=100000000"]
OVERRIDES = {
    "cached": [],
    "recomputed": RECOMPUTED,
    "mixed": RECOMPUTED[:1],
    "features held": FEATURES_HELD,
    "recomputed and features held": [*RECOMPUTED, *FEATURES_HELD],
    "gradient shares": ["log_gradient_shares=true"],
}


@pytest.fixture(scope="module")
def on_accelerator():
    worker = Worker()
    yield worker
    worker.close()


# The accelerator itself


def train_a_layer() -> tuple[str, list[float]]:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 5).to(DEVICE), torch.randn(3, 4).to(DEVICE)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(inputs).square().sum().backward()
    optimizer.step()
    return str(layer.weight.grad.device), layer.weight.flatten().tolist()


def test_a_layer_trains_there_as_on_the_cpu(on_accelerator):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 5), torch.randn(3, 4)
    layer(inputs).square().sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    device, trained = on_accelerator(train_a_layer)
    assert device == DEVICE and trained == pytest.approx(layer.weight.flatten().tolist())


def there(*shape: int) -> torch.Tensor:
    return torch.ones(*shape).to(DEVICE)


def add() -> None:
    there(3) + torch.ones(3)


def add_in_place() -> None:
    torch.ones(3).add_(there(3))


def multiply_matrices() -> None:
    there(2, 3) @ torch.ones(3, 2)


def stack_totals() -> None:
    torch.stack([there(3).sum(), torch.zeros(())])


def gather() -> None:
    there(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.long))


def embed() -> None:
    nn.functional.embedding(torch.tensor([0, 1]), there(4, 2))


def put() -> None:
    tensor = there(4)
    tensor[torch.tensor([True, False, True, False])] = torch.ones(2)


def index_the_cpu() -> None:
    torch.ones(3)[there(2).long()]


@pytest.mark.parametrize(
    "mixed", [add, add_in_place, multiply_matrices, stack_totals, gather, embed, put, index_the_cpu]
)
def test_an_operation_that_mixes_devices_is_refused(mixed, on_accelerator):
    with pytest.raises(MixedDevicesError, match=r"got tensors on gpu:0, and on the cpu of shape \("):
        on_accelerator(mixed)


def allowed() -> list[float]:
    tensor = there(3) * torch.tensor(2.0)
    tensor[torch.tensor([0])] = torch.tensor(5.0)
    return [*tensor[torch.tensor([0, 1])].tolist(), tensor.sum().item(), *tensor.cpu().numpy().tolist()]


def test_what_a_real_one_allows_is_allowed(on_accelerator):
    """Indices on the CPU, and a CPU tensor without axes in the place of a number."""
    assert on_accelerator(allowed) == [5.0, 2.0, 9.0, 5.0, 2.0, 2.0]


def to_numpy() -> None:
    np.asarray(there(3))


def test_its_tensors_are_no_numpy_arrays(on_accelerator):
    with pytest.raises(TypeError, match="to numpy"):
        on_accelerator(to_numpy)


# Stage 1


def test_stage_1_stores_the_values_of_the_cpu(on_accelerator, experiment, tmp_path):
    config = experiment.config(tmp_path, f"cache.path={tmp_path}/store", f"teacher.device={DEVICE}")
    on_accelerator(cache_teacher, config)
    assert_equal_values(stored_arrays(tmp_path / "store"), stored_arrays(experiment.store))


def assert_equal_values(mine, theirs, *, atol: float = 1e-6) -> None:
    assert mine.keys() == theirs.keys()
    for key, arrays in theirs.items():
        for name, values in arrays.items():
            for one, other in zip(mine[key][name], values, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=atol, err_msg=f"{key} {name}")


def run_stub(config: Config, device: str, batch) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    plan = plan_teacher(config.teacher.model, targets=config.targets.recomputed())
    stub = load_teacher(plan, dtype=torch.float32, device=torch.device(device))
    features = batch.encoded_by(stub.encode_images)
    attention = stub.forward(batch, features).attention
    return features.flat.cpu().numpy(), {layer: block.cpu().numpy() for layer, block in attention.items()}


def test_the_stub_computes_what_it_does_on_the_cpu(on_accelerator, experiment, make_batch, tmp_path):
    config, batch = experiment.config(tmp_path, *RECOMPUTED), make_batch([3, -200, 5], [4, -200, -200, 3])
    vision, attention = run_stub(config, "cpu", batch)
    there_vision, there_attention = on_accelerator(run_stub, config, DEVICE, batch)
    np.testing.assert_allclose(there_vision, vision, rtol=1e-5, atol=1e-6)
    assert there_attention.keys() == attention.keys() == {0, 1}
    for layer, block in attention.items():
        np.testing.assert_allclose(there_attention[layer], block, rtol=1e-5, atol=1e-6)


# Stage 2


def train_there(config: Config, folder: Path) -> None:
    assert str(training_arguments(config, folder).device) == DEVICE
    train_student(config, folder)


@pytest.fixture(scope="module")
def lacking(experiment, tmp_path_factory):
    """Overrides for a store that lacks some samples, whose targets are recomputed."""
    folder = tmp_path_factory.mktemp("lacking")
    store = rewrite_store(experiment.store, folder / "store", without=["a1", "two", "t1"])
    given = [
        {"path": str(store), "targets": ["attention", "vision"]},
        {"path": str(experiment.store), "targets": ["logits"]},
    ]
    return ["cache=null", f"caches={json.dumps(given)}", "on_missing=recompute"]


@pytest.mark.parametrize("case", [*OVERRIDES, "missing"])
def test_stage_2_trains_for_two_epochs_as_on_the_cpu(case, on_accelerator, experiment, lacking, tmp_path):
    overrides = [*TWO_EPOCHS, *(lacking if case == "missing" else OVERRIDES[case])]
    train_student(experiment.config(tmp_path, *overrides), tmp_path / "cpu")
    on_accelerator(
        train_there, experiment.config(tmp_path, *overrides, "train.use_cpu=false"), tmp_path / "there"
    )
    # 13 samples in steps of 4, twice
    assert_trained_alike(tmp_path / "there", tmp_path / "cpu", num_steps=8)


def assert_trained_alike(there: Path, on_cpu: Path, *, num_steps: int) -> None:
    """Compare the losses of every step, and the trained weights."""
    mine, expected = losses_of_steps(there), losses_of_steps(on_cpu)
    assert len(mine) == len(expected) == num_steps
    for step, other in zip(mine, expected, strict=True):
        assert step == pytest.approx(other, rel=1e-4, abs=1e-6)
    trained, expected_weights = (weights(folder / "model") for folder in (there, on_cpu))
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-3, atol=1e-4)


# Other families: tiles, and grids with features that are added after decoder layers


class FamilyRun(NamedTuple):
    """The config of a family's experiment, and its store from the CPU's stage 1."""

    file: Path
    overrides: list[str]
    store: Path

    def config(self, *overrides: str) -> Config:
        return load_config(self.file, [*self.overrides, *overrides])


@pytest.fixture(scope="module", params=["internvl", "qwen3_vl"])
def family_run(request, family_folder, family_shards, tmp_path_factory) -> FamilyRun:
    folder = tmp_path_factory.mktemp(request.param)
    file = write_config(request.param, family_folder(request.param), family_shards, folder)
    exact = ["targets.attention.codec=float32", "targets.vision.codec=float32"]
    on_cpu = ["teacher.device=cpu", "train.use_cpu=true"]
    run = FamilyRun(file, [*exact, *on_cpu], folder / "store")
    cache_teacher(run.config())
    return run


def test_stage_1_of_another_family_stores_the_values_of_the_cpu(on_accelerator, family_run, tmp_path):
    on_accelerator(
        cache_teacher, family_run.config(f"cache.path={tmp_path}/store", f"teacher.device={DEVICE}")
    )
    # Features of theirs reach 5, and attention that runs unfused rounds otherwise.
    assert_equal_values(stored_arrays(tmp_path / "store"), stored_arrays(family_run.store), atol=1e-5)


@pytest.mark.parametrize("overrides", [[], RECOMPUTED], ids=["cached", "recomputed"])
def test_stage_2_of_another_family_trains_as_on_the_cpu(overrides, on_accelerator, family_run, tmp_path):
    train_student(family_run.config(*overrides), tmp_path / "cpu")
    on_accelerator(train_there, family_run.config(*overrides, "train.use_cpu=false"), tmp_path / "there")
    assert_trained_alike(tmp_path / "there", tmp_path / "cpu", num_steps=2)


# Evaluation


def answers(config: Config, folder: Path, device: str) -> list[str]:
    asked = evaluate_model(
        config.student.model,
        config.data,
        config.evaluate,
        output=folder / f"{device}.jsonl",
        device=torch.device(device),
    )
    return [prediction.prediction for prediction in asked]


def test_evaluation_gives_the_answers_of_the_cpu(on_accelerator, experiment, tmp_path):
    config = experiment.config(tmp_path)
    assert on_accelerator(answers, config, tmp_path, DEVICE) == answers(config, tmp_path, "cpu")
