"""`train.bf16`: the student computes in bfloat16, its weights, the losses and what is logged stay float32."""

from __future__ import annotations

import pytest
import torch
from small_experiment import weights
from test_resume import TEN_STEPS, assert_same_run, curve, stop_after

from pipeline.distill.model.distiller import Distiller
from pipeline.distill.student import train_student
from pipeline.errors import TrainingStopped


def test_losses_and_weights_stay_float32_while_the_student_computes_in_bfloat16(
    experiment, tmp_path, monkeypatch
):
    terms, outputs = [], []
    forward, student_outputs = Distiller.forward, Distiller._student_outputs
    monkeypatch.setattr(Distiller, "forward", lambda d, b: terms.append(forward(d, b)) or terms[-1])
    monkeypatch.setattr(
        Distiller, "_student_outputs", lambda *a: outputs.append(student_outputs(*a)) or outputs[-1]
    )
    train_student(experiment.config(tmp_path, "train.bf16=true"), tmp_path / "bf16")
    assert {total.dtype for batch in terms for total, _ in batch.terms.values()} == {torch.float32}
    assert {batch.answer_logits.dtype for batch, _ in outputs} == {torch.bfloat16}
    assert {value.dtype for value in weights(tmp_path / "bf16" / "model").values()} == {torch.float32}
    monkeypatch.undo()
    train_student(experiment.config(tmp_path), tmp_path / "float32")
    mine, theirs = (curve(tmp_path / name)[0]["loss"] for name in ("bf16", "float32"))
    assert mine == pytest.approx(theirs, rel=2e-2) and mine != theirs  # eight bits of mantissa


def test_a_run_in_bfloat16_goes_on_bit_for_bit(experiment, tmp_path, monkeypatch):
    config = experiment.config(tmp_path, *TEN_STEPS, "train.bf16=true")
    train_student(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(5, patch)
        train_student(config, tmp_path / "run")
    train_student(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
