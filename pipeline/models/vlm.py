"""The door: what the stages ask of a vision-language model of any family, in transformers' own terms."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.errors import ConfigError, reason_of
from pipeline.models.anatomy import anatomy_of
from pipeline.models.configuration import image_token_of
from pipeline.models.families import FAMILIES, Family
from pipeline.models.image_features import ImageFeatures
from pipeline.models.processors import Tensors
from pipeline.models.tap import TAPPED, attention_of_layers, keeping_hidden, query_to_vision, recording
from pipeline.positions import Slots, find_slots, last_prompt_positions

# What torch says of tensors that do not fit together.
ABOUT_SHAPES = (
    "must match",
    "shapes cannot be multiplied",
    "is invalid for input",
    "to have",
    "expected input",
)


@dataclass(frozen=True)
class Forward:
    """One batch through a model, as far as it was asked for.

    `logits`           'A V' at the chosen positions, and `final` 'A D', what the head gets there
    `attention`        layer -> float32 'B H T J'
    `query_attention`  float32 'B H J' of the last prompt position, a softmax over the vision columns alone
    `hidden`           'B S D', the input of a layer of the decoder
    """

    slots: Slots
    logits: Tensor | None
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    final: Tensor | None = None
    query_attention: Tensor | None = None
    hidden: Tensor | None = None


class VisionLanguageModel:
    """A model of any family that `AutoModelForImageTextToText` loads. It holds the module and adds no parameters."""

    def __init__(self, network: Any):
        self.network = network
        self.config = network.config
        self.family = FAMILIES.get(self.config.model_type, Family())
        self.decoder = network.get_decoder()
        self.decoder.set_attn_implementation({"": TAPPED})
        self.accepted = inspect.signature(network.forward).parameters.keys()
        if "mm_encoder_outputs" not in self.accepted:
            raise ConfigError(
                f"{type(network).__name__} of transformers {transformers.__version__} takes no features computed "
                "before (mm_encoder_outputs); use transformers 5.18 or later, or another family"
            )
        if not hasattr(network, "get_image_features"):
            raise ConfigError(
                f"{type(network).__name__} of transformers {transformers.__version__} has no get_image_features; use "
                "another family"
            )

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where the weights are; those that a stub does not read are on the meta device."""
        return next(parameter.device for parameter in self.network.parameters() if not parameter.is_meta)

    @property
    def image_token_id(self) -> int:
        return image_token_of(self.config)

    @cached_property
    def connector_names(self) -> frozenset[str]:
        """The names of the projector's parameters: all that make vision features, but for the frozen tower."""
        tower = self.network.get_encoder(modality="image")
        [prefix] = [name for name, module in self.network.named_modules() if module is tower]
        kept = tuple(f"{prefix}.{name}." for name in self.family.trained_in_tower)
        return frozenset(
            name for name in self._of_vision if not name.startswith(f"{prefix}.") or name.startswith(kept)
        )

    @cached_property
    def _of_vision(self) -> list[str]:
        """The names of all parameters that text alone does not need; adapters lie in the decoder's layers."""
        anatomy = anatomy_of(self.config)
        named = (name for name, _ in self.network.named_parameters())
        return [name for name in named if name not in anatomy.text and not name.startswith(anatomy.layers)]

    def freeze_tower(self) -> None:
        """Stop the training of the vision tower, and of nothing else."""
        for name in self._of_vision:
            if name not in self.connector_names:
                self.network.get_parameter(name).requires_grad_(False)

    # Images

    @property
    def splits_tower(self) -> bool:
        """Whether the frozen tower's result can be had, and held, without the projector: `patch_features`."""
        return hasattr(self.network, "get_patch_features")

    def patch_features(self, images: Sequence[Tensors]) -> Tensor:
        """Return what the frozen tower gives of images: 'I M W'."""
        return self.network.get_patch_features(self.joined(images)["pixel_values"])

    def encode(
        self, images: Sequence[Tensors], sizes: Sequence[int], *, patch_features: Tensor | None = None
    ) -> ImageFeatures:
        """Return the projected features of images, which have these numbers of vision tokens.

        Raises `ConfigError` if the model makes other numbers: its processor is not its own then.
        """
        if patch_features is not None:
            output = self.network.get_image_features(patch_features=patch_features)
            return self._features(output, sizes, {})
        inputs = self.joined(images)
        taken = inspect.signature(self.network.get_image_features).parameters
        with _refusing_pixels():
            output = self.network.get_image_features(
                **{name: value for name, value in inputs.items() if name in taken}, return_dict=True
            )
        return self._features(output, sizes, inputs)

    def joined(self, images: Sequence[Tensors]) -> dict[str, Tensor]:
        """Return the pixel inputs of several images as the family takes them, on the model's device."""
        names = images[0] if images else ()
        joined = {name: self.family.join([image[name] for image in images]) for name in names}
        return {name: to_device(tensor, self.device) for name, tensor in joined.items()}

    def _features(self, output: Any, sizes: Sequence[int], inputs: Mapping[str, Tensor]) -> ImageFeatures:
        pooled = output.pooler_output
        deepstack = getattr(output, "deepstack_features", None) or ()
        by_layer = [_by_image(layer, sizes) for layer in deepstack]
        grids = inputs.get("image_grid_thw")
        return ImageFeatures(
            _by_image(pooled, sizes),
            tuple(zip(*by_layer, strict=True)),
            is_list=not isinstance(pooled, Tensor),
            grids=() if grids is None else tuple(grids),
        )

    # Text and images

    def forward(
        self,
        batch: Mapping[str, Any],
        features: ImageFeatures | None,
        *,
        layers: Collection[int] = (),
        query_layer: int | None = None,
        hidden_layer: int | None = None,
        stop_at: int | None = None,
        answers: Tensor | None = None,
    ) -> Forward:
        """Run a batch of `pad_tokens`, with the features of all its images in order.

        `layers` are the numbers of those whose attention is wanted, among the layers that have attention, and
        `query_layer` that of `query_attention`. `hidden_layer` counts the decoder's layers; of L, their number, the
        last one's output is kept. `answers` bool 'B S' are the positions whose logits are wanted. With `stop_at` the
        forward ends in that layer, or where it keeps `hidden`, if that comes later.
        """
        slots = find_slots(batch["is_vision"], batch["attention_mask"], batch["sizes"])
        logits = query = None
        final: list[Tensor] = []
        head = self._at(answers, final) if answers is not None else nullcontext()
        hidden = keeping_hidden(self.decoder, hidden_layer) if hidden_layer is not None else nullcontext()
        chosen = {*layers} if query_layer is None else {*layers, query_layer}
        with recording(chosen, stop_at=stop_at, wants_hidden=hidden_layer is not None) as made, hidden, head:
            logits = self.network(**self.inputs(batch, features), use_cache=False).logits
        attention = attention_of_layers({n: one for n, one in made.kept.items() if n in layers}, slots)
        if query_layer is not None:
            rows = last_prompt_positions(batch["labels"], batch["attention_mask"])
            query = query_to_vision(made.kept[query_layer], rows, slots.vision, whole_row=False)
        return Forward(slots, logits, attention, next(iter(final), None), query, made.hidden)

    def inputs(self, batch: Mapping[str, Any], features: ImageFeatures | None) -> dict[str, Any]:
        """Return the arguments of the family's forward."""
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.family.token_types is not None and "token_type_ids" in self.accepted:
            inputs["token_type_ids"] = self.family.token_types(batch["is_vision"], batch["labels"])
        if features is None:
            return inputs
        if "mm_token_type_ids" in self.accepted:
            inputs["mm_token_type_ids"] = batch["is_vision"].int()
        if features.grids:
            inputs["image_grid_thw"] = torch.stack(features.grids)
        return inputs | {"mm_encoder_outputs": {"image": features.to_output()}}

    @contextmanager
    def _at(self, positions: Tensor, final: list[Tensor]) -> Iterator[None]:
        """Let the head run at these positions alone, bool 'B S': an answer is a few of them, a vocabulary is wide.

        `logits_to_keep` takes one set of positions for all samples; here each sample has its own. What the head gets
        there is appended to `final`.
        """

        def at_positions(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            final.append(args[0][positions])
            return (final[-1], *args[1:])

        head: nn.Module = self.network.get_output_embeddings()
        handle = head.register_forward_pre_hook(at_positions)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def generate(self, batch: Mapping[str, Any], features: ImageFeatures | None, **settings: Any) -> Tensor:
        """Return the new ids 'B S' that follow prompts padded on the left."""
        inputs = self.inputs(batch, features)
        made = self.network.generate(**inputs, **settings)
        return made[:, batch["input_ids"].shape[1] :]


@contextmanager
def _refusing_pixels() -> Iterator[None]:
    """Turn what a tower raises over pixels of another shape into one sentence, and nothing else."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ABOUT_SHAPES):
            raise
        raise ConfigError(
            f"the vision tower does not take the images of its processor ({reason_of(error)}); use the processor "
            "files that belong to the checkpoint"
        ) from error


def _by_image(values: Any, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return features of images, given as a tensor or as a list of images or tiles, as 'N D' of each image.

    Raises `ConfigError` unless every image ends where an image or tile of the model's ends: a total that happens to
    fit is not enough. Idefics3 and SmolVLM return all tiles as one; of these the total alone can be compared.
    """
    parts = [part.reshape(-1, part.shape[-1]) for part in values]
    ends, asked = list(accumulate(map(len, parts))), list(accumulate(sizes))
    if ends[-1:] != asked[-1:] or not (len(parts) == 1 or set(asked) <= set(ends)):
        raise ConfigError(
            f"the model makes {[len(part) for part in parts]} vision tokens of {len(sizes)} images for which its "
            f"processor writes {list(sizes)}; use the processor files that belong to the checkpoint"
        )
    return torch.cat(parts).split(list(sizes))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device; from the CPU to a GPU without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Only from pinned memory is the copy asynchronous.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
