"""Operations counted from shapes against torch's own counter, and the page of assumptions that is made of them."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
try:
    import extrapolate
    import stage1
    from flops import Model, Sample, bare, stage_2, stub
    from profiles import PROFILES, STEPS
    from random_models import MODELS, write_model, write_shard
finally:
    sys.path.remove(str(BENCH))

TOKENS = 220


def _counting() -> FlopCounterMode:
    """Torch does not know what its attention on a CPU costs."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(
        display=False,
        custom_mapping={on_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)},
    )


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Namespace:
    folder = tmp_path_factory.mktemp("bench")
    write_model(folder / "teacher", "tiny", "teacher")
    write_shard(folder / "data", samples=1, tokens=TOKENS)
    return Namespace(size="tiny", tokens=TOKENS, samples=1, batch_size=1, folder=str(folder))


def _counted(options: Namespace, targets: dict) -> tuple[int, Sample]:
    """Of one sample through a real teacher, and that sample's lengths."""
    teacher, [(tokens, pixels)] = stage1._batches(options, targets)
    with _counting() as counter:
        found = teacher.forward(**tokens, vision=teacher.encode_images(pixels))
    positions = tokens["input_ids"].shape[1] + 143
    return counter.get_total_flops(), Sample(
        positions, int((found.slots.text >= 0).sum()), sum(found.num_answers)
    )


def test_the_operations_of_a_whole_teacher_are_those_that_torch_counts(options):
    counted, sample = _counted(options, {"logits": {"top_k": 32}})
    assert bare(Model.of(MODELS["tiny", "teacher"]), sample) == pytest.approx(counted, rel=1e-3)


def test_the_operations_of_a_stub_are_those_that_torch_counts(options):
    counted, sample = _counted(options, {"attention": {"layers": [0]}, "vision": {}})
    model = Model.of(MODELS["tiny", "teacher"])
    without_answers = Sample(sample.positions, sample.text_rows, 0)
    assert stub(model, without_answers) == pytest.approx(counted, rel=1e-3)


def test_training_is_three_forwards_of_what_is_trained_and_one_of_the_tower():
    model, sample = Model.of(MODELS["full", "student"]), Sample(335, 190, 190)
    once, again = (stage_2(model, sample, checkpointing=on) for on in (False, True))
    assert again - once == model.decoder(sample)
    trained = model.projector() + model.decoder(sample) + model.head(190) + model.tap(sample)
    assert once == model.tower() + 3 * trained


def test_the_full_models_cost_what_their_weights_say():
    sample = Sample(335, 190, 190)
    for role, layers_of_weights in (("teacher", 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
                                    ("student", 24 * (4 * 2048**2 + 3 * 2048 * 5632))):  # fmt: skip
        model = Model.of(MODELS["full", role])
        assert model.decoder(sample) == pytest.approx(2 * layers_of_weights * 335, rel=0.03)


def test_a_store_is_worth_its_price_when_it_saves_the_teacher_often_enough():
    assert extrapolate.break_even(saved=10, once=10) == 1
    assert extrapolate.break_even(saved=10, once=10.5) == 2
    assert extrapolate.break_even(saved=10, once=40) == 4


def test_bytes_before_compression_are_shapes_times_widths():
    tokens = 2 * 4 * (1 + 190 + 1)
    logits = 190 * (32 * (2 + 2) + 2)
    assert extrapolate.stored_bytes("pretrain", "logits only") == tokens + logits
    vision, attention = 4096 * 144 * 2, 190 * (144 + 2)
    assert extrapolate.stored_bytes("pretrain", "default") == tokens + logits + vision + attention


def test_bytes_of_longer_synthetic_samples_are_scaled_to_the_mean_length():
    arrays = {"vision": 1000.0, "attention/layer_0": 380.0, "logits/ids": 190.0}
    row = {"step": "pretrain", "text_rows": 380.0, "answers": 95.0, "array_bytes_per_sample": arrays}
    assert extrapolate.compressed_bytes(row | {"other_bytes_per_sample": 5.0}) == 1000 + 190 + 380 + 5


def test_the_page_marks_every_assumption_and_says_what_was_not_measured(tmp_path):
    command = [sys.executable, str(BENCH / "extrapolate.py"), "--profiles", str(tmp_path / "none.json")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assumed = [line for line in process.stdout.splitlines() if line.startswith("ASSUMED")]
    assert len(assumed) == len(list(extrapolate.Assumptions().lines()))
    for word in ("published", "utilisation", "an hour", "a TB and month", *STEPS):
        assert any(word in line for line in assumed), word
    assert process.stdout.count("not measured: run python bench/profiles.py") == len(PROFILES)
