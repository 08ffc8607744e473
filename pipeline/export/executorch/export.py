"""`alignkd export executorch`: write the programs, compare them with PyTorch, write the card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.export.executorch.card import write_card
from pipeline.export.executorch.folder import ExecutorchFolder, write_executorch
from pipeline.export.executorch.verify import Verification, verify_executorch
from pipeline.export.pictures import picture_files
from pipeline.export.source import Source


def export_executorch(
    source: Source,
    folder: Path,
    *,
    images: Path | None = None,
    question: str = "What is in the picture?",
    max_new_tokens: int = 16,
    decoder: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[ExecutorchFolder, Verification | None]:
    """Write the programs and their card; with a folder of `images`, compare them with PyTorch on each.

    With `decoder` the language model is written as well, where the family allows it.
    """
    if images is not None:
        picture_files(images)  # raises before minutes are spent on an export
    written = write_executorch(source, folder, decoder=decoder, overwrite=overwrite, say=say)
    found = None
    if images is not None:
        options = {"question": question, "max_new_tokens": max_new_tokens}
        found = verify_executorch(written, source, images, **options, say=say)
    write_card(written, source, verified=str(found) if found else None)
    return written, found
