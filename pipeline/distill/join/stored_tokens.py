"""The tokens of a stored sample, of either format of the store."""

from __future__ import annotations

from cache import Manifest, SampleEntry
from pipeline.data.conversation import TokenizedSample
from pipeline.data.template_preparation import expanded
from pipeline.targets.target import Arrays

TOKENS = ("input_ids", "labels")


def pop_tokens(arrays: Arrays, entry: SampleEntry, manifest: Manifest) -> TokenizedSample:
    """Take the token ids and labels out of a sample's stored arrays."""
    ids, labels = arrays.pop("input_ids").tolist(), arrays.pop("labels").tolist()
    if manifest.format_version == 1:  # of MobileVLM V2: one id for each image, all of N vision tokens
        return expanded(ids, labels, manifest.teacher["num_vision_tokens"])
    return TokenizedSample(tuple(ids), tuple(labels), entry.tokens, entry.grids)
