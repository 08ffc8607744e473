"""MobileVLM V2 (arXiv 2402.03766): CLIP tower, LDPNetV2 projector and LLaMA, in the published layout.

Written for transformers 5. `tests/test_mobilevlm.py` compares its outputs with the original code's.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel, LlamaModel
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from pipeline.errors import building
from pipeline.models.files.checkpoint import check_loaded, checkpoint_folder, loading
from pipeline.models.mobilevlm.configuration import (
    IMAGE_TOKEN_ID,
    MobileVLMConfig,
    check_tower_is_here,
    read_mobilevlm_config,
)
from pipeline.models.mobilevlm.vision import LDPNetV2, VisionTower, build_tower
from pipeline.shapes import expect_shape

TOWER_PREFIX = "model.vision_tower."


class MobileVLMPreTrainedModel(LlamaPreTrainedModel):
    """The base of both classes below: sets the config class, and how a new tower is initialised."""

    config_class = MobileVLMConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPVisionEmbeddings):
            init.normal_(module.class_embedding, std=module.embed_dim**-0.5)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))


class MobileVLMModel(MobileVLMPreTrainedModel, LlamaModel):
    """The LLaMA body, the tower and the projector, under the checkpoint's names."""

    def __init__(self, config: MobileVLMConfig):
        super().__init__(config)
        self.vision_tower: Any = build_tower(
            config.tower,
            select_layer=config.mm_vision_select_layer,
            select_feature=config.mm_vision_select_feature,
        )
        self.mm_projector = LDPNetV2(
            config.tower.hidden_size, config.hidden_size, grid_size=config.mm_projector_grid
        )
        self.post_init()

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the vision tokens 'I N D' of images as `pooler_output`, from pixels 'I C Y X' or patches 'I M W'."""
        if patch_features is None:
            assert pixel_values is not None
            patch_features = self.vision_tower(pixel_values)
        patches: Any = patch_features
        vision_tokens = self.mm_projector(patches.to(next(self.mm_projector.parameters()).dtype))
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=vision_tokens)


class ImageCountError(ValueError):
    """The number of image tokens and the number of images of a batch do not correspond."""


class MobileVLMForCausalLM(MobileVLMPreTrainedModel, GenerationMixin):
    """MobileVLM V2 with a language-model head."""

    input_modalities = ["image", "text"]

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]
    # Buffers that older transformers releases wrote into checkpoints. They are computed anew.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"embeddings\.position_ids"]

    def __init__(self, config: MobileVLMConfig):
        super().__init__(config)
        self.model = MobileVLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.model.vision_tower.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """Load a checkpoint folder or hub id, sharded or not, `.bin` or safetensors.

        The tower comes from the checkpoint or, if the checkpoint has none, from `mm_vision_tower`.
        Raises `ConfigError` naming the first other tensor that is missing or of another shape: none stays random.
        """
        want_info = kwargs.pop("output_loading_info", False)
        if "config" not in kwargs:
            read_mobilevlm_config(
                checkpoint_folder(str(pretrained_model_name_or_path))
            )  # raises the clearer errors
        with loading(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # checked below
                **kwargs,
            )
        model, info = loaded
        missing = set(info["missing_keys"])
        tower_keys = {key for key in model.state_dict() if key.startswith(TOWER_PREFIX)}
        has_no_tower = tower_keys <= missing and model.config.vision_tower_type == "clip"
        if has_no_tower:
            missing -= tower_keys
        check_loaded(pretrained_model_name_or_path, mismatched=info["mismatched_keys"], missing=missing)
        if has_no_tower:
            _load_tower(model)
        # Loading replaces the parameters, and the new ones are not frozen.
        model.model.vision_tower.requires_grad_(False)
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory, **kwargs):
        """Write the published layout; `architectures` keeps the original code's class name."""
        super().save_pretrained(save_directory, **kwargs)
        config_file = Path(save_directory) / "config.json"
        if not config_file.is_file():  # another process writes
            return
        fields = json.loads(config_file.read_text()) | {"architectures": ["MobileLlamaForCausalLM"]}
        config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        for file in Path(save_directory).glob("*.safetensors"):
            # safetensors lets only the owner read its files. A file system without modes refuses to change that.
            with suppress(OSError):
                file.chmod(config_file.stat().st_mode)

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the patch features of the frozen tower's selected layer: 'I C Y X' -> 'I M W'."""
        return self.model.vision_tower(pixel_values)

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        patch_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the vision tokens 'I N D' of images as `pooler_output`, from pixels 'I C Y X' or patches 'I M W'."""
        return self.model.get_image_features(pixel_values, patch_features=patch_features)

    def names_never_read(self) -> list[str]:
        """Return the tensors of the tower that no forward reads: the layers behind the selected one."""
        tower = self.model.vision_tower
        if not isinstance(tower, VisionTower):
            return []
        names = [name for name, _ in tower.named_parameters()]
        return [f"{TOWER_PREFIX}{name}" for name in names if not tower.reads(name)]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits 'B S V' and, with `labels`, the mean cross entropy per valid token.

        In `input_ids` every image is N times the image token, as the processor writes it. `pixel_values` 'I C Y X',
        or what `get_image_features` returned of them, are all images of the batch in order.
        Raises `ImageCountError` if image tokens and images do not correspond.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            images = (mm_encoder_outputs or {}).get("image")
            if images is None and pixel_values is not None:
                images = self.get_image_features(pixel_values)
            inputs_embeds = self.embed(input_ids, None if images is None else images.pooler_output)
        if labels is not None:
            kwargs.setdefault("use_cache", False)
        outputs = self.model(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )

    def embed(self, input_ids: torch.Tensor, vision_tokens: torch.Tensor | None) -> torch.Tensor:
        """Embed token ids 'B S' and put vision tokens 'I N D' or 'G D' in the places of the image tokens: 'B S D'."""
        expect_shape("input_ids", input_ids, "B S")
        is_image = input_ids == IMAGE_TOKEN_ID
        embeds = self.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        found, given = int(is_image.sum()), 0 if vision_tokens is None else vision_tokens.shape[:-1].numel()
        if found != given:
            size = self.config.num_vision_tokens
            raise ImageCountError(
                f"the batch holds {found} image tokens ({IMAGE_TOKEN_ID}), its images have {given} vision tokens; "
                f"write {size} for each image, in order, as MobileVLMProcessor does"
            )
        if vision_tokens is None:
            return embeds
        return embeds.masked_scatter(is_image[:, :, None], vision_tokens.to(embeds.dtype))


def _load_tower(model: MobileVLMForCausalLM) -> None:
    """Fill the tower from the CLIP checkpoint that the config names, a local folder or hub id."""
    name = model.config.mm_vision_tower
    check_tower_is_here(name)
    with building(f"mm_vision_tower {name}", then="name a CLIP checkpoint of the geometry in config.json"):
        clip = CLIPVisionModel.from_pretrained(name, dtype=model.dtype)
        weights = {key.removeprefix("vision_model."): value for key, value in clip.state_dict().items()}
        model.model.vision_tower.vision_tower.vision_model.load_state_dict(weights)


AutoModelForCausalLM.register(MobileVLMConfig, MobileVLMForCausalLM)
AutoModelForImageTextToText.register(MobileVLMConfig, MobileVLMForCausalLM)
