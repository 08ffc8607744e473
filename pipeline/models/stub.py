"""The teacher in memory: the whole model where the targets keep its answers, else a stub, a few percent of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, building
from pipeline.models.anatomy import empty_network
from pipeline.models.processors import Tensors
from pipeline.models.teacher_plan import TeacherPlan
from pipeline.models.vlm import Forward, ImageFeatures, VisionLanguageModel, to_device
from pipeline.positions import IGNORE_INDEX, find_slots
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.query_attention import QueryAttentionTarget
from pipeline.targets.target import TeacherForward


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. It runs without gradients but not in inference mode: its results meet trained tensors."""

    vlm: VisionLanguageModel
    plan: TeacherPlan
    device: torch.device

    @property
    def attention_layers(self) -> Sequence[int]:
        attention = self.plan.targets.get("attention")
        return attention.layers if isinstance(attention, AttentionTarget) else ()

    @property
    def query_layer(self) -> int | None:
        query = self.plan.targets.get("query_attention")
        return query.layer if isinstance(query, QueryAttentionTarget) else None

    @property
    def runs_decoder(self) -> bool:
        """Whether a target needs more than the vision features: else the embeddings were not loaded."""
        return self.plan.deepest != -1 or self.plan.hidden_layer is not None

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Tensors], sizes: Sequence[int], *, patch_features: Tensor | None = None
    ) -> ImageFeatures:
        """Return the projected vision features of images, as `VisionLanguageModel.encode`."""
        with self._in_its_own_dtype():
            return self.vlm.encode(images, sizes, patch_features=patch_features)

    def _in_its_own_dtype(self) -> AbstractContextManager[Any]:
        """Switch autocast off: a stub beside a student computes in the dtype of the store."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any], features: ImageFeatures | None) -> TeacherForward:
        """Run one batch of `pad_tokens`, with the features of all its images in order."""
        batch = {
            name: to_device(value, self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        predicts = batch["labels"][:, 1:] != IGNORE_INDEX
        if self.runs_decoder:
            made = self._forward(batch, features, predicts)
        else:
            made = Forward(find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"]), None)
        return TeacherForward(
            slots=made.slots,
            attention=made.attention,
            answer_logits=made.logits,
            num_answers=predicts.sum(dim=1).tolist(),
            sizes=batch["sizes"],
            is_real=batch["attention_mask"].bool(),
            hidden=made.hidden,
            answer_hidden=made.final,
            query_attention=made.query_attention,
        )

    def _forward(self, batch: Mapping[str, Any], features: ImageFeatures | None, predicts: Tensor) -> Forward:
        # The last position predicts nothing.
        answers = None if self.plan.is_stub else nn.functional.pad(predicts, (0, 1))
        with self._in_its_own_dtype():
            return self.vlm.forward(
                batch,
                features,
                layers=self.attention_layers,
                query_layer=self.query_layer,
                hidden_layer=self.plan.hidden_layer,
                stop_at=self.plan.deepest,
                answers=answers,
            )


def load_teacher(plan: TeacherPlan, *, dtype: torch.dtype, device: torch.device) -> Teacher:
    """Load the planned tensors, and no others, in evaluation mode.

    Raises `ConfigError` if a tensor's shape is not that of the config, or if the device cannot hold it.
    """
    network = empty_network(plan.config, dtype=dtype)
    expected = network.state_dict()
    weights: dict[str, Tensor] = {}
    names = {source: name for name, source in plan.tensors.items()}
    for source, tensor in plan.checkpoint.tensors(names):
        name = names[source]
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"{plan.checkpoint.folder}: tensor {source!r} has shape {tuple(tensor.shape)}, its config.json "
                f"asks for {tuple(expected[name].shape)}; use the config.json that belongs to the checkpoint"
            )
        with building(f"teacher {plan.checkpoint.folder} on {device}", then="choose another teacher.device"):
            weights[name] = tensor.to(dtype=dtype if tensor.is_floating_point() else None, device=device)
    # All other tensors stay on the meta device, where any use of them raises: a mistake in the plan cannot go unseen.
    network.load_state_dict(weights, strict=False, assign=True)
    compute_buffers(network, device)
    if plan.is_stub:
        _answer_for_what_is_absent(network)
    else:
        network.tie_weights()
    network.eval().requires_grad_(False)
    return Teacher(VisionLanguageModel(network), plan, device)


def compute_buffers(network: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies, as transformers does on loading."""
    for module in network.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for tensor in (*network.parameters(), *(b for _, b in network.named_buffers() if b.is_meta)):
        tensor._is_hf_initialized = True  # transformers' mark: leave it as it is
    network.initialize_weights()


class _Absent(nn.Module):
    """Stands for a module of a stub without weights, whose result reaches neither query nor key of the last layer.

    An attention function gets query, key and value at once, so the value is made, too: of zeros here.
    """

    def __init__(self, width: int | None):
        super().__init__()
        self.width = width

    def forward(self, values: Tensor) -> Tensor:
        return values if self.width is None else values.new_zeros(()).expand(*values.shape[:-1], self.width)


def _answer_for_what_is_absent(network: Any) -> None:
    """Replace, in layers of the decoder that have some weights, the modules that have none."""
    for layer in network.get_decoder().layers:
        if all(parameter.is_meta for parameter in layer.parameters()):
            continue
        for name, module in list(layer.named_modules()):
            own = list(module.parameters(recurse=False))
            if own and all(parameter.is_meta for parameter in own):
                width = module.out_features if isinstance(module, nn.Linear) else None
                layer.set_submodule(name, _Absent(width))
