"""`mmproj.gguf`: the CLIP tower and the LDPNetV2 projector, under llama.cpp's architecture `clip`."""

from __future__ import annotations

from functools import partial

from gguf import GGMLQuantizationType, GGUFWriter
from transformers import CLIPVisionConfig

from pipeline.export.gguf.geometry import selected_layer
from pipeline.export.gguf.types import FILE_TYPES
from pipeline.export.gguf.writing import Layout, Planned
from pipeline.export.source import Source
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.models.mobilevlm.images import clip_processor

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
MATRIX_TYPES = {"f16": F16, "q8_0": GGMLQuantizationType.Q8_0}
TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR = "model.mm_projector."
# fc1 is called `ffn_down` and fc2 `ffn_up`: builds of 2024 assert that, and later ones swap them back.
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}
NORMS = {"layer_norm1": "ln1", "layer_norm2": "ln2"}
PAIR = ("weight", "bias")


def vision_layout(source: Source, quant: str) -> Layout:
    """Return what the file of tower and projector holds; `quant` is f16 or q8_0: fewer bits cost a tower too much."""
    return Layout("clip", partial(_describe, source=source, quant=quant), vision_plan(source.config, quant))


def vision_plan(config: MobileVLMConfig, quant: str) -> list[Planned]:
    """Return the tensors of the file, in order: all layers, and never the norm behind the last one."""
    matrix = MATRIX_TYPES[quant]
    plan = [
        Planned("v.class_embd", f"{TOWER}embeddings.class_embedding", F32),
        # The kernels of convolutions must be F16; llama.cpp ends the process over any other type.
        Planned("v.patch_embd.weight", f"{TOWER}embeddings.patch_embedding.weight", F16),
        Planned("v.position_embd.weight", f"{TOWER}embeddings.position_embedding.weight", F32),
        *(Planned(f"v.pre_ln.{part}", f"{TOWER}pre_layrnorm.{part}", F32) for part in PAIR),
    ]
    for n in range(config.tower.num_hidden_layers):  # pyright: ignore[reportAttributeAccessIssue]
        layer = f"{TOWER}encoder.layers.{n}"
        for origin, name in (MATRICES | NORMS).items():
            kind = matrix if origin in MATRICES else F32
            plan.append(Planned(f"v.blk.{n}.{name}.weight", f"{layer}.{origin}.weight", kind))
            plan.append(Planned(f"v.blk.{n}.{name}.bias", f"{layer}.{origin}.bias", F32))
    for n in (0, 2):
        plan.append(Planned(f"mm.model.mlp.{n}.weight", f"{PROJECTOR}mlp.mlp.{n}.weight", matrix))
        plan.append(Planned(f"mm.model.mlp.{n}.bias", f"{PROJECTOR}mlp.mlp.{n}.bias", F32))
    plan.append(Planned("mm.model.peg.0.weight", f"{PROJECTOR}peg.peg.0.weight", F16))
    plan.append(Planned("mm.model.peg.0.bias", f"{PROJECTOR}peg.peg.0.bias", F32))
    return plan


def _describe(writer: GGUFWriter, *, source: Source, quant: str) -> None:
    config: MobileVLMConfig = source.config
    tower = config.tower
    assert isinstance(tower, CLIPVisionConfig)
    writer.add_name(f"{source.name} vision")
    writer.add_type("mmproj")
    writer.add_string("alignkd.source_digest", source.digest)
    writer.add_file_type(FILE_TYPES[quant])
    for name, value in (("vision_encoder", True), ("text_encoder", False), ("llava_projector", True)):
        writer.add_bool(f"clip.has_{name}", value)
    writer.add_string("clip.projector_type", "ldpv2")
    writer.add_bool("clip.use_gelu", tower.hidden_act == "gelu")
    sizes = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "embedding_length": tower.hidden_size,
        "feed_forward_length": tower.intermediate_size,
        "projection_dim": config.hidden_size,
        "attention.head_count": tower.num_attention_heads,
        # Builds of 2024 run one layer less than this; later ones run as many as `feature_layer` says. With all
        # layers in the file, both take the last but one.
        "block_count": tower.num_hidden_layers,
    }
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", int(size))  # pyright: ignore[reportArgumentType]
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", tower.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [selected_layer(config)])
    images = clip_processor(source.folder, tower.image_size)  # pyright: ignore[reportArgumentType]
    writer.add_array("clip.vision.image_mean", [float(mean) for mean in images.image_mean])
    writer.add_array("clip.vision.image_std", [float(std) for std in images.image_std])
