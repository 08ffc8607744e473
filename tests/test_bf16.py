"""`train.bf16`: the student computes in bfloat16, its weights, the losses and what is logged stay float32."""

from __future__ import annotations

import pytest
import torch
from small_experiment import weights
from test_resume import TEN_STEPS, assert_same_run, curve
from torch import nn
from watched import results_of, train_until

from pipeline.distill.model.distiller import Distiller
from pipeline.distill.student import train_student


def test_losses_and_weights_stay_float32_while_the_student_computes_in_bfloat16(experiment, tmp_path):
    with results_of(Distiller) as terms, results_of(nn.Linear) as linear:
        train_student(experiment.config(tmp_path, "train.bf16=true"), tmp_path / "bf16")
    assert {total.dtype for batch in terms for total, _ in batch.values()} == {torch.float32}
    widths = {result.shape[-1]: result.dtype for result in linear}
    assert widths[512] == torch.bfloat16  # logits over the vocabulary
    assert {value.dtype for value in weights(tmp_path / "bf16" / "model").values()} == {torch.float32}
    train_student(experiment.config(tmp_path), tmp_path / "float32")
    mine, theirs = (curve(tmp_path / name)[0]["loss"] for name in ("bf16", "float32"))
    assert mine == pytest.approx(theirs, rel=2e-2) and mine != theirs  # eight bits of mantissa


def test_a_run_in_bfloat16_goes_on_bit_for_bit(experiment, tmp_path):
    config = experiment.config(tmp_path, *TEN_STEPS, "train.bf16=true")
    train_student(config, tmp_path / "whole")
    train_until(5, config, tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
