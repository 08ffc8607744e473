"""The two models of an experiment: where their weights come from, and how they run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.settings import LocalPath, Section

DType = Literal["auto", "float32", "bfloat16", "float16"]
DECODER_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TeacherConfig(Section):
    """The model whose outputs are cached, of a family that is let in."""

    model: LocalPath
    """Checkpoint folder or hub id. Stage 2 reads its weights only to recompute targets.
    [stage 1, stage 2, evaluate; store]"""
    dtype: DType = "auto"
    """Dtype of its weights in stage 1; `auto` takes the checkpoint's own. [stage 1; store]"""
    device: str = "auto"
    """Device of stage 1, such as `cuda:1`; `auto` takes a GPU if there is one. [stage 1]"""
    batch_size: int | Literal["auto"] = "auto"
    """Size of the first batch, halved where memory runs out; `auto` begins with a large one. [samples; stage 1]"""
    blind_ok: bool = Field(default=False, exclude_if=lambda ok: not ok)
    """Silences the warning that answers hardly depend on the images, such as for text-only data. [stage 1]"""

    @field_validator("batch_size", mode="before")
    @classmethod
    def _auto_or_a_number(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError(f"expected auto, or a number from 1 on, found {value!r}")
        return value


class LoraConfig(Section):
    """Trains low-rank adapters in the decoder's layers, the projector and the heads, instead of all weights.

    Of a twig its norm and its head are trained in full, too.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of an adapter. [dimensions; stage 2; run]"""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of an adapter, which is divided by the rank. [factor; stage 2; run]"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of an adapter's input. [probability; stage 2; run]"""
    target_modules: Annotated[list[str], Field(min_length=1)] = list(DECODER_MAPS)
    """Linear maps of a decoder layer that get an adapter. [stage 2; run]"""


class StudentConfig(Section):
    """The model that is trained. Stage 1 reads it only to refuse a pair that stage 2 would refuse."""

    model: LocalPath
    """Checkpoint folder or hub id of its first weights and its tokenizer. [stage 1, stage 2; run]"""
    dtype: DType = "float32"
    """Dtype of its weights. [stage 2; run]"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time. [stage 2; run]"""
    projector_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the projector; null: `train.learning_rate`. [per step; stage 2; run]"""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the trained heads; null: `train.learning_rate`. [per step; stage 2; run]"""
    patch_feature_cache_bytes: int = Field(default=0, ge=0)
    """Memory for the frozen vision tower's output of each distinct image. [bytes; stage 2; run]"""
    lora: LoraConfig | None = None
