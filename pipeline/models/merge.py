"""The merged sequence that the language model reads: vision tokens in place of image placeholders."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.positions import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Slots, find_slots


@dataclass(frozen=True)
class MergedInputs:
    """A batch with vision tokens in place of placeholders; S is the merged length.

    `inputs_embeds` 'B S D', `attention_mask` bool 'B S', `labels` int64 'B S', `slots`.
    Positions after a sample's end are zero vectors, masked, with label -100.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    slots: Slots


class ImageCountError(ValueError):
    """The number of placeholders and the number of images of a batch differ."""


def merged_positions(input_ids: torch.Tensor, num_vision_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every token's first merged position and every sample's merged length: 'B S' -> 'B S', 'B'."""
    widths = torch.where(input_ids == IMAGE_TOKEN_INDEX, num_vision_tokens, 1)
    ends = widths.cumsum(dim=1)
    return ends - widths, ends[:, -1]


def merge_vision_tokens(
    input_ids: torch.Tensor,
    text_embeds: torch.Tensor,
    image_features: torch.Tensor | None,
    *,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_vision_tokens: int,
) -> MergedInputs:
    """Put each image's vision tokens at its placeholder.

    `input_ids` 'B S' has -200 for an image. `text_embeds` 'B S D' may hold anything at placeholders.
    `image_features` 'I N D' are all images of the batch in order, or None for text alone.
    Raises `ImageCountError` if placeholders and images do not correspond one to one.
    """
    is_image = input_ids == IMAGE_TOKEN_INDEX
    num_images = 0 if image_features is None else image_features.shape[0]
    if int(is_image.sum()) != num_images:
        raise ImageCountError(
            f"the batch holds {int(is_image.sum())} image placeholders ({IMAGE_TOKEN_INDEX}) "
            f"but {num_images} images; give one image for each placeholder, in order"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if labels is None:
        labels = torch.full_like(input_ids, IGNORE_INDEX)
    starts, lengths = merged_positions(input_ids, num_vision_tokens)
    batch, length = input_ids.shape[0], int(lengths.max())
    sample = torch.arange(batch, device=input_ids.device)[:, None].expand_as(input_ids)

    embeds = text_embeds.new_zeros(batch, length, text_embeds.shape[-1])
    mask = torch.zeros(batch, length, dtype=torch.bool, device=input_ids.device)
    merged_labels = labels.new_full((batch, length), IGNORE_INDEX)
    is_vision = torch.zeros_like(mask)

    text_at = (sample[~is_image], starts[~is_image])
    embeds = embeds.index_put(text_at, text_embeds[~is_image])
    mask[text_at] = attention_mask[~is_image].bool()
    merged_labels[text_at] = labels[~is_image]
    if image_features is not None and num_images:
        columns = starts[is_image][:, None] + torch.arange(num_vision_tokens, device=input_ids.device)
        vision_at = (sample[is_image][:, None].expand_as(columns), columns)
        embeds = embeds.index_put(vision_at, image_features.to(embeds.dtype))
        mask[vision_at] = True
        is_vision[vision_at] = True
    return MergedInputs(embeds, mask, merged_labels, find_slots(is_vision, mask))
