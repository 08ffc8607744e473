"""In which type each tensor is stored: llama.cpp's own choices, so that our files equal those of its tool.

`libgguf` is llama.cpp's quantisation code. The choice of types is that of `llama-quantize` (llama_tensor_get_type).
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from pipeline.errors import ConfigError

Type = GGMLQuantizationType
FLOATS = {Type.F32: np.float32, Type.F16: np.float16}
# What a row that is no multiple of 256 is stored in instead.
SHORTER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
FILE_TYPES = {
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
LARGEST_F16 = float(np.finfo(np.float16).max)


def language_model_type(name: str, quant: str, *, num_layers: int, is_head: bool) -> GGMLQuantizationType:
    """Return the type of a matrix of the language model, by its name in the file.

    `is_head` is true of the output matrix, which is the embedding where both are one.
    """
    if quant != "q4_k_m":
        return Type.Q8_0 if quant == "q8_0" else Type.F16
    if is_head or (name.endswith(("attn_v.weight", "ffn_down.weight")) and _has_more_bits(name, num_layers)):
        return Type.Q6_K
    return Type.Q4_K


def _has_more_bits(name: str, num_layers: int) -> bool:
    """Whether a layer is among the first eighth, the last eighth, or every third between."""
    layer, eighth = int(name.split(".")[1]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def fitting(wanted: GGMLQuantizationType, row: int) -> GGMLQuantizationType:
    """Return a type whose blocks divide a row of this length: the one that is wanted, or the next best."""
    while row % GGML_QUANT_SIZES[wanted][0]:
        wanted = SHORTER_BLOCKS.get(wanted, Type.F16)
    return wanted


def stored(tensor: torch.Tensor, type_: GGMLQuantizationType, *, name: str) -> np.ndarray:
    """Return a tensor's bytes in a type: floats in their shape, else uint8 with a row's blocks in the last axis.

    Raises `ConfigError` naming a tensor that holds values which are not finite, or too large for 16 bits.
    """
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise ConfigError(f"tensor {name!r} holds values that are not finite; export a sound checkpoint")
    if type_ is Type.F16 and np.abs(values).max(initial=0) > LARGEST_F16:
        raise ConfigError(
            f"tensor {name!r} holds {np.abs(values).max():g}, beyond the largest number of 16 bits; export --quant "
            "q8_0, whose scales are smaller"
        )
    if type_ in FLOATS:
        return values.astype(FLOATS[type_])
    from libgguf import quantize_rows

    rows = quantize_rows(values.reshape(-1, values.shape[-1]), type_)
    return np.ascontiguousarray(rows).view(np.uint8).reshape(*values.shape[:-1], -1)


def read_back(data: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
    """Return the float32 values of a tensor as `stored` wrote it."""
    if type_ in FLOATS:
        return data.astype(np.float32)
    from libgguf import dequantize_rows

    return np.asarray(dequantize_rows(data, type_), np.float32)
