"""The card of an export (README.md): what the programs take and return, how to prepare it, how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config.provenance import replace_text
from pipeline.export.executorch.decoder import CHUNK, why_not
from pipeline.export.executorch.folder import CARD, ExecutorchFolder
from pipeline.export.executorch.inputs import Inputs
from pipeline.export.origin import head, origin_lines
from pipeline.export.pictures import background
from pipeline.export.source import Source
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.readable import readable_bytes


def write_card(folder: ExecutorchFolder, source: Source, *, verified: str | None) -> Path:
    """Write the card beside the files; `verified` is the table of a verification. Without one an old card stays."""
    file = folder.path / CARD
    if verified or not file.exists():
        replace_text(file, card(folder, source, verified=verified))
    return file


def card(folder: ExecutorchFolder, source: Source, *, verified: str | None) -> str:
    """Return the card's text."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    mark, inputs = folder.mark, Inputs(source)
    number, width = mark["vision_tokens"]
    sizes = {name: readable_bytes(size) for name, size in mark["bytes"].items()}
    return templates.get_template("card.md.j2").render(
        head=head(source, f"executorch, {mark['family']}"),
        origin=origin_lines(source),
        source=source,
        files=[(name, sizes[name], digest) for name, digest in mark["files"].items()],
        pixels=f"({', '.join(map(str, mark['pixel_values']))})",
        dimensions=", ".join(map(str, mark["pixel_values"])),
        number=number,
        width=width,
        prompt=inputs.text_about("What is in the picture?"),
        marker=inputs.processor.image_token,
        side=inputs.side,
        causal=why_not(source.config) is None,
        context=mark["context"],
        chunk=min(CHUNK, mark["context"] or CHUNK),
        stops=mark["stops"],
        vocabulary=mark["vocabulary"],
        verified=verified,
        **_preparation(source, inputs),
    )


def _preparation(source: Source, inputs: Inputs) -> dict[str, Any]:
    """Return what MobileVLM V2's pictures go through; `clip` is None for a family with a processor of its own."""
    if not isinstance(source.config, MobileVLMConfig):
        return {"clip": None, "pads": None, "colour": None}
    processor = inputs.processor
    return {"clip": processor.image_processor, "pads": processor.pads, "colour": background(source)}
