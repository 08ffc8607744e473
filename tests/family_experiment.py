"""A config of both stages for a tiny checkpoint of any family."""

from __future__ import annotations

from pathlib import Path

import tiny_families
import yaml


def write_config(family: str, teacher: Path, shards: Path, folder: Path) -> Path:
    """Write a config of both stages: a smaller student of the teacher's family, every loss, two steps."""
    smaller = (
        {"hidden_size": 16, "num_hidden_layers": 3} if family == "mobilevlm" else {"num_hidden_layers": 3}
    )
    student = tiny_families.write_checkpoint(family, folder / "student", seed=1, **smaller)
    config = {
        "output_dir": str(folder / "run"),
        "teacher": {"model": str(teacher), "batch_size": 3},
        "student": {"model": str(student), "gradient_checkpointing": True},
        "data": {"shards": str(shards), "template": "v1" if family == "mobilevlm" else "chat"},
        "cache": {"path": str(folder / "store")},
        "targets": {
            "attention": {"layers": [0, 1], "heads": "each"},
            "vision": {"codec": "float16"},
            "logits": {"top_k": 8, "tail_samples": 4},
        },
        "losses": {
            "attention": {"layers": [[0, 0], [1, 1]], "heads": "mix"},
            "vision_all": {},
            "vision_focus": {"k": 3},
            "logits": {"direction": "forward"},
        },
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "report_to": "none",
            "logging_steps": 1,
        },
        # PaliGemma takes one exchange, and one of the questions follows another.
        "evaluate": None if family == "paligemma" else {"shards": str(shards), "max_new_tokens": 3},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
