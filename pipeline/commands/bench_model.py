"""What a model costs and answers in each runtime: bench-model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import AsJson, ConfigFile, Overrides, load, say


def bench_model(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint, training folder or hub id; default: the student that the config trains."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of exports and results; default: OUTPUT_DIR/phone.")
    ] = None,
    quants: Annotated[str, typer.Option(help="Quantisations of the GGUF files.")] = "f16,q8_0,q4_k_m",
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions for the accuracies.")] = 300,
    turns: Annotated[
        int, typer.Option(min=1, help="Questions for the times; each runtime answers each.")
    ] = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Length of the answers that are timed.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each runtime; default: all cores.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a MobileVLM V2 in PyTorch, llama.cpp and ExecuTorch: speed, memory, size, accuracy.

    The exports are written where they are missing. All runtimes answer the same questions in alternating turns.
    """
    settings = load(config, overrides)
    from pipeline.errors import ConfigError, needing

    with needing("llama-cpp", by="alignkd bench-model"):
        import libgguf  # noqa: F401

        from pipeline.phone.bench import bench_model
        from pipeline.phone.contestants import QUANTS
    with needing("report", by="alignkd bench-model"):
        from pipeline.phone.answers import draw_answers
        from pipeline.phone.picture import draw_bench
    from pipeline.export.source import Source

    wanted = [quant.strip() for quant in quants.split(",")]
    if unknown := [quant for quant in wanted if quant not in QUANTS]:
        raise ConfigError(f"--quants: unknown {', '.join(map(repr, unknown))}; known are {', '.join(QUANTS)}")
    folder = output or Path(settings.output_dir) / "phone"
    result, shown = bench_model(
        Source.of(model or _student(settings.output_dir)),
        settings,
        folder,
        quants=wanted,
        num_questions=questions,
        turns=turns,
        new_tokens=new_tokens,
        threads=threads or os.cpu_count() or 1,
        say=say,
    )
    file = result.write(folder)
    draw_answers(shown, folder / "answers.png")
    draw_bench(result, folder / "bench-model.png", folder / "bench-model.svg")
    print(file.read_text() if as_json else result, end="\n" * (not as_json))


def _student(output_dir: str) -> str:
    """Return the folder of the student that the config trains."""
    from pipeline.errors import ConfigError

    student = Path(output_dir) / "align_kd"
    if not student.is_dir():
        raise ConfigError(
            f"{student}: no student yet; train it with `alignkd distill`, or name one by --model"
        )
    return str(student)
