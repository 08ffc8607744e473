"""The preparation of a checkpoint: MobileVLM V2's templates, or the checkpoint's own processor and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.config import DataConfig
from pipeline.data.chat_preparation import ChatPreparation
from pipeline.data.preparation import Preparation
from pipeline.data.template_preparation import TemplatePreparation
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import checkpoint_folder
from pipeline.models.mobilevlm import MobileVLMConfig


def load_preparation(model: str, data: DataConfig) -> Preparation:
    """Return the preparation of a checkpoint (folder or hub id); opens no weights."""
    folder = checkpoint_folder(model)
    return preparation_of(folder, read_config(folder), data)


def preparation_of(folder: Path, config: Any, data: DataConfig) -> Preparation:
    """Return the preparation of a checkpoint's folder whose config is read already."""
    if isinstance(config, MobileVLMConfig):
        return TemplatePreparation.of(folder, config, data)
    return ChatPreparation.of(folder, config, data)
