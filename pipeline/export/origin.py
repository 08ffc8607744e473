"""Where an exported model comes from, for the cards."""

from __future__ import annotations

from typing import Any

from pipeline.export.source import Source


def origin_lines(source: Source) -> str:
    """Return a Markdown list of student, teacher and data, as far as the training's provenance names them."""
    config: dict[str, Any] = source.origin.get("config") or {}
    rows = {"Source": f"`{source.name}`, blake3 of its tensors `{source.digest}`"}
    if config:
        shards = (config.get("data") or {}).get("shards") or []
        rows |= {
            "Trained from": f"`{(config.get('student') or {}).get('model')}`",
            "Teacher": f"`{(config.get('teacher') or {}).get('model')}`",
            "Data": ", ".join(f"`{one}`" for one in ([shards] if isinstance(shards, str) else shards)),
            "Losses": _losses(config),
        }
    else:
        rows["Teacher and data"] = "not known: the checkpoint does not lie in a folder of `alignkd distill`"
    rows["Licence"] = source.licence or (
        "not named by whoever exported it; those of student, teacher and data may bind whoever uses the model"
    )
    return "\n".join(f"- **{name}**: {text}" for name, text in rows.items())


def head(source: Source, tags: str) -> str:
    """Return the YAML head of a card, as model hubs read it."""
    licence = source.licence or "other"
    tags = f"[alignkd, knowledge-distillation, {tags}]"
    return f"---\nlicense: {licence}\ntags: {tags}\npipeline_tag: image-text-to-text\n---"


def _losses(config: dict[str, Any]) -> str:
    losses = config.get("losses") or {}
    return ", ".join(f"`{name}`" for name, settings in losses.items() if settings) or "labels only"
