"""`model.gguf`: the language model, under llama.cpp's architecture `llama`."""

from __future__ import annotations

from functools import partial
from typing import Any

from gguf import GGMLQuantizationType, GGUFWriter

from pipeline.export.gguf.geometry import head_width
from pipeline.export.gguf.types import FILE_TYPES, language_model_type
from pipeline.export.gguf.vocabulary import Vocabulary
from pipeline.export.gguf.writing import Layout, Planned
from pipeline.export.source import Source
from pipeline.models.mobilevlm import MobileVLMConfig

QUANTISATION_VERSION = 2  # of the blocks' layout (GGML_QNT_VERSION)
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def language_model_layout(source: Source, quant: str) -> Layout:
    """Return what the file of a checkpoint's language model holds, quantised as `llama-quantize` does.

    Raises `ConfigError` for a tokenizer that does not fit.
    """
    config: MobileVLMConfig = source.config
    vocabulary = Vocabulary.of(source.folder, config.vocab_size)
    describe = partial(_describe, source=source, vocabulary=vocabulary, quant=quant)
    return Layout("llama", describe, language_model_plan(config, quant))


def language_model_plan(config: MobileVLMConfig, quant: str) -> list[Planned]:
    """Return the tensors of the file, in order. One matrix is both embedding and output where they are tied."""
    tied, num_layers = bool(config.tie_word_embeddings), config.num_hidden_layers

    def matrix(name: str, origin: str, *, is_head: bool = False, heads: int | None = None) -> Planned:
        kind = language_model_type(name, quant, num_layers=num_layers, is_head=is_head)
        return Planned(name, origin, kind, heads)

    def norm(name: str, origin: str) -> Planned:
        return Planned(name, origin, GGMLQuantizationType.F32)

    plan = [
        matrix("token_embd.weight", "model.embed_tokens.weight", is_head=tied),
        norm("output_norm.weight", "model.norm.weight"),
    ]
    if not tied:
        plan.append(matrix("output.weight", "lm_head.weight", is_head=True))
    permuted_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for n in range(num_layers):
        layer = f"model.layers.{n}"
        plan += [norm(f"blk.{n}.{name}.weight", f"{layer}.{origin}.weight") for origin, name in NORMS.items()]
        plan += [
            matrix(f"blk.{n}.{name}.weight", f"{layer}.{origin}.weight", heads=permuted_heads.get(name))
            for origin, name in MATRICES.items()
        ]
    return plan


def _describe(writer: GGUFWriter, *, source: Source, vocabulary: Vocabulary, quant: str) -> None:
    config: MobileVLMConfig = source.config
    writer.add_name(source.name)
    if source.licence:
        writer.add_license(source.licence)
    writer.add_string("alignkd.source_digest", source.digest)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(QUANTISATION_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    head = head_width(config)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    vocabulary.write(writer)
