"""The two models of an experiment: where their weights come from, and how they run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.settings import LocalPath, Section

DType = Literal["auto", "float32", "bfloat16", "float16"]
DECODER_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TeacherConfig(Section):
    """The model whose outputs are cached: a checkpoint folder or a hub id, of a family that is let in.

    Stage 1 begins with `batch_size` and halves it where memory runs out; `auto` begins with a large batch.
    """

    model: LocalPath
    dtype: DType = "auto"
    device: str = "auto"
    batch_size: int | Literal["auto"] = "auto"

    @field_validator("batch_size", mode="before")
    @classmethod
    def _auto_or_a_number(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and value >= 1):
            raise ValueError(f"expected auto, or a number from 1 on, found {value!r}")
        return value


class LoraConfig(Section):
    """Trains low-rank adapters in the decoder's layers, the projector and the heads, instead of all weights.

    `target_modules` are the linear maps of a decoder layer that get an adapter.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = list(DECODER_MAPS)


class StudentConfig(Section):
    """The model that is trained: the source of its first weights and of its tokenizer.

    Learning rates of the projector and of the heads default to `train.learning_rate`. With a frozen vision tower,
    up to `patch_feature_cache_bytes` of memory hold its output for each distinct image.
    """

    model: LocalPath
    dtype: DType = "float32"
    gradient_checkpointing: bool = False
    projector_learning_rate: float | None = Field(default=None, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    patch_feature_cache_bytes: int = Field(default=0, ge=0)
    lora: LoraConfig | None = None
