"""Look at one stored sample: inspect STORE KEY (the teacher's attention as a picture), inspect sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.commands.options import ConfigFile, Overrides, StoredConfig, StorePath, load_or_stored

if TYPE_CHECKING:
    from pipeline.inspection.sample import Inspection

SampleKey = Annotated[str, typer.Argument(help="A sample's key; `alignkd inspect keys` lists some.")]


class AttentionByDefault(TyperGroup):
    """Reads `inspect STORE KEY` as `inspect attention STORE KEY`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["attention", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=AttentionByDefault,
    no_args_is_help=True,
    help="Look at one sample of a store, without the teacher. `inspect STORE KEY` draws its attention.",
)


@app.command()
def attention(
    store: StorePath,
    key: SampleKey,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="PNG or SVG file.")] = Path("attention.png"),
    layer: Annotated[
        int | None, typer.Option(min=0, help="Teacher layer; default: the losses' first.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Focus tokens; default: vision_focus.k.")] = None,
    student: Annotated[str | None, typer.Option(help="A student's checkpoint: before and after.")] = None,
    student_layer: Annotated[
        int | None, typer.Option(min=0, help="Default: the teacher layer's pair in losses.attention.layers.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Text tokens to draw, the first ones.")] = 40,
    config: StoredConfig = None,
) -> None:
    """Draw an image and the teacher's text-to-vision attention, a heat map for each text token; outline focus tokens.

    With --student, the picture adds the config's untrained student, this one, and its difference to the teacher.
    """
    from pipeline.errors import needing
    from pipeline.inspection.sample import paired_layer, student_attention

    with needing("report", by="alignkd inspect attention"):
        from pipeline.inspection.attention_picture import draw_attention
    inspection = _inspect(store, key, config, overrides, layer=layer, k=k)
    students = {"before": inspection.config.student.model, "after": student} if student else {}
    if student and student_layer is None:
        student_layer = paired_layer(inspection)
    drawn = {
        name: student_attention(inspection, model, layer=student_layer)
        for name, model in students.items()
        if student_layer is not None
    }
    draw_attention(inspection, out, students=drawn, student_layer=student_layer, max_tokens=max_tokens)
    print(out)


@app.command()
def sample(
    store: StorePath, key: SampleKey, overrides: Overrides = None, config: StoredConfig = None
) -> None:
    """Print a sample's tokens in colour (trained tokens, images) and the teacher's most likely answers."""
    from rich.console import Console

    from pipeline.inspection.sample_text import describe_sample

    Console(highlight=False).print(describe_sample(_inspect(store, key, config, overrides)))


@app.command()
def keys(
    store: StorePath, count: Annotated[int, typer.Option(min=1, help="How many, the first ones.")] = 20
) -> None:
    """List the keys of a store's samples, one on each line."""
    from itertools import islice

    from cache import Store

    for key in islice(Store(store).keys(), count):
        print(key)


@app.command()
def layers(
    config: ConfigFile,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=2, help="Samples with images to measure on.")] = 64,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: beside the store, where `suggested` finds it.")
    ] = None,
) -> None:
    """Measure which of the teacher's layers look at the image: how much, and whether the question moves the look.

    No label is needed. The config then may say `suggested` in place of a teacher's layer.
    """
    from pipeline.config.config import load_config
    from pipeline.inspection.layer_table import measure_and_write

    asked = load_config(config, overrides or [], suggested_layer=0)
    print(measure_and_write(asked, num_samples=samples, output=output))


def _inspect(
    store: str, key: str, config: Path | None, overrides: list[str] | None, **options: Any
) -> Inspection:
    from pipeline.inspection.sample import inspect_sample

    return inspect_sample(store, key, config=load_or_stored(store, config, overrides), **options)
