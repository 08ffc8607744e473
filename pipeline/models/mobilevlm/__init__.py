"""MobileVLM V2 as a citizen of transformers: config, model and processor, known to its Auto classes."""

from __future__ import annotations

from pipeline.models.mobilevlm.configuration import IMAGE_TOKEN_ID, MobileVLMConfig
from pipeline.models.mobilevlm.model import MobileVLMForCausalLM, MobileVLMModel
from pipeline.models.mobilevlm.processor import MobileVLMProcessor

__all__ = [
    "IMAGE_TOKEN_ID",
    "MobileVLMConfig",
    "MobileVLMForCausalLM",
    "MobileVLMModel",
    "MobileVLMProcessor",
]
