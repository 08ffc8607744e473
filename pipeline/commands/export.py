"""Checkpoints for other runtimes: export hf, export gguf, export executorch."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import fail_unless, say

app = typer.Typer(no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A checkpoint: a local folder, a training's folder, or a hub id.")]
Folder = Annotated[Path, typer.Argument(help="Folder for what is written.")]
Licence = Annotated[
    str | None, typer.Option("--license", help="Licence to name in the card, such as apache-2.0.")
]
Verify = Annotated[
    Path | None,
    typer.Option(
        help="Folder of at least 20 images: run the files in the real runtime, compare with PyTorch."
    ),
]
Question = Annotated[str, typer.Option(help="Asked about each image by --verify.")]
ASKED = "What is in the picture?"
LongestAnswer = Annotated[int, typer.Option(min=1, help="Longest answer of --verify, in tokens.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an export that lies there.")]


class Quantisation(StrEnum):
    """What `--quant` takes."""

    F16 = "f16"
    Q8_0 = "q8_0"
    Q4_K_M = "q4_k_m"


class VisionQuantisation(StrEnum):
    """What `--vision` takes."""

    F16 = "f16"
    Q8_0 = "q8_0"


class Dtype(StrEnum):
    """What `--dtype` takes."""

    SOURCE = "source"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@app.callback()
def without_bars() -> None:
    """Write a checkpoint for another runtime: a phone's, or its family's own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command()
def hf(
    model: Model,
    folder: Folder,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; default: as they are.")] = Dtype.SOURCE,
    as_bin: Annotated[
        bool, typer.Option("--bin", help="Write pytorch_model.bin, as old code reads it.")
    ] = False,
    licence: Licence = None,
    overwrite: Replace = False,
) -> None:
    """Write a checkpoint in its family's own layout: what upstream code and converters load.

    MobileVLM V2 is written as published, for the original code; other families as transformers writes them, with
    their processor.
    """
    from pipeline.export.hf import export_hf
    from pipeline.export.source import Source

    print(
        export_hf(
            Source.of(model, licence=licence),
            folder,
            dtype=dtype.value,
            as_bin=as_bin,
            overwrite=overwrite,
            say=say,
        )
    )


@app.command()
def gguf(
    model: Model,
    folder: Folder,
    quant: Annotated[Quantisation, typer.Option(help="Of the language model.")] = Quantisation.Q4_K_M,
    vision: Annotated[
        VisionQuantisation, typer.Option(help="Of tower and projector.")
    ] = VisionQuantisation.F16,
    no_vision: Annotated[
        bool,
        typer.Option("--no-vision", help="Write the language model alone; embeddings come from elsewhere."),
    ] = False,
    verify: Verify = None,
    question: Question = ASKED,
    max_new_tokens: LongestAnswer = 16,
    licence: Licence = None,
    overwrite: Replace = False,
) -> None:
    """Write model.gguf and mmproj.gguf of a MobileVLM V2 for llama.cpp, and a card that says how to run them.

    With --verify the exit code is 1 if llama.cpp computes something else than PyTorch with the same weights.
    """
    from pipeline.errors import needing

    with needing("gguf", by="alignkd export gguf"):
        import libgguf  # noqa: F401

        from pipeline.export.gguf.card import write_card
        from pipeline.export.gguf.folder import export_gguf
    from pipeline.export.source import Source

    if verify is not None:
        _check_can_verify(verify)
    source = Source.of(model, licence=licence)
    written = export_gguf(
        source,
        folder,
        quant=quant.value,
        vision=None if no_vision else vision.value,
        overwrite=overwrite,
        say=say,
    )
    found = None
    if verify is not None:
        from pipeline.export.llama_cpp.verify import verify_gguf

        threads = os.cpu_count() or 1
        found = verify_gguf(
            written,
            source,
            verify,
            question=question,
            max_new_tokens=max_new_tokens,
            threads=threads,
            say=say,
        )
        print(found)
    print(write_card(written, source, verified=str(found) if found else None))
    fail_unless(found is None or found.passed)


def _check_can_verify(images: Path) -> None:
    """Raise `ConfigError` if llama.cpp or the images are missing, before minutes are spent on an export."""
    from pipeline.errors import needing

    with needing("llama-cpp", by="--verify"):
        import cffi  # noqa: F401
    from pipeline.export.llama_cpp.library import load_library
    from pipeline.export.pictures import picture_files

    load_library()
    picture_files(images)


@app.command()
def executorch(
    model: Model,
    folder: Folder,
    decoder: Annotated[
        bool, typer.Option(help="Write the language model, too, where its family allows it.")
    ] = True,
    verify: Verify = None,
    question: Question = ASKED,
    max_new_tokens: LongestAnswer = 16,
    licence: Licence = None,
    overwrite: Replace = False,
) -> None:
    """Write eyes.pte (tower and projector) and decoder.pte for ExecuTorch, and a card that says how to run them.

    The eyes' embeddings also serve llama.cpp: see `export gguf --no-vision`. With --verify the exit code is 1 if the
    files compute something else than PyTorch.
    """
    from pipeline.export.executorch.export import export_executorch
    from pipeline.export.source import Source

    written, found = export_executorch(
        Source.of(model, licence=licence),
        folder,
        images=verify,
        question=question,
        max_new_tokens=max_new_tokens,
        decoder=decoder,
        overwrite=overwrite,
        say=say,
    )
    if found:
        print(found)
    print(written.path / "README.md")
    fail_unless(found is None or found.passed)
