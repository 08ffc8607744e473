"""The card of a GGUF export (README.md): what the files are, how to run them, and what llama.cpp gets wrong."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.config.provenance import replace_text
from pipeline.export.gguf.folder import CARD, GGUFFolder
from pipeline.export.origin import head, origin_lines
from pipeline.export.pictures import background
from pipeline.export.source import Source
from pipeline.export.torch_model import prompt_about
from pipeline.readable import readable_bytes

MARKER = "<__media__>"  # llama.cpp's, for an image in a prompt
QUESTION = "What is in the picture?"
LANGUAGE_MODEL = {
    "f16": "matrices in 16-bit floats, norms in 32",
    "q8_0": "matrices in 8 bits (Q8_0), norms in 32-bit floats",
    "q4_k_m": "matrices in 4 bits (Q4_K), the output and some of attn_v and ffn_down in 6 (Q6_K), as `llama-quantize "
    "Q4_K_M` chooses; norms in 32-bit floats",
}
EYES = {
    "f16": "tower and projector (`ldpv2`), matrices in 16-bit floats",
    "q8_0": "tower and projector (`ldpv2`), matrices in 8 bits (Q8_0); fewer would cost too much",
    None: "none; image embeddings are computed elsewhere, see below",
}


def write_card(folder: GGUFFolder, source: Source, *, verified: str | None) -> Path:
    """Write the card beside the files; `verified` is the table of a verification. Without one an old card stays."""
    file = folder.path / CARD
    if verified or not file.exists():
        replace_text(file, card(folder, source, verified=verified))
    return file


def card(folder: GGUFFolder, source: Source, *, verified: str | None) -> str:
    """Return the card's text."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    sizes = {name: readable_bytes((folder.path / name).stat().st_size) for name in folder.files}
    return templates.get_template("card.md.j2").render(
        head=head(source, "gguf, llama.cpp, mobilevlm"),
        origin=origin_lines(source),
        files=[(name, sizes[name], digest) for name, digest in folder.files.items()],
        language_model=LANGUAGE_MODEL[folder.quant],
        eyes=EYES[folder.vision],
        vision=folder.vision,
        prompt=prompt_about(QUESTION).replace("<image>", MARKER),
        source=source,
        tower=source.config.tower,
        colour=background(source),
        verified=verified,
    )
