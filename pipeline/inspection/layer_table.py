"""The measured layers of a teacher as a table and a file."""

from __future__ import annotations

from pathlib import Path

from cache import local
from pipeline.config.config import Config
from pipeline.config.provenance import replace_text
from pipeline.config.suggested_layers import suggestion_file
from pipeline.errors import writing
from pipeline.inspection.layers import LayerLooks, measure_layers
from pipeline.text_table import text_table

HEADS = ("layer", "attention on images", "moved by the question", "changed by the image")


def measure_and_write(config: Config, *, num_samples: int, output: Path | None = None) -> str:
    """Measure the layers of the config's teacher, write them, and return a table with the suggestion.

    Raises `ConfigError` if they cannot be measured, and `NotThere` if the file would lie beside a store behind a URL.
    """
    file = output or local(suggestion_file(config.all_caches()[0].path), doing="given a suggestion")
    found = measure_layers(config, num_samples=num_samples)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, found.to_json())
    return f"{layer_table(found)}\n{_conclusion(found)}\n{file}"


def layer_table(found: LayerLooks) -> str:
    """Return the layers as a table, in percent; the suggested one is marked."""
    rows = [
        (
            f"{look.layer}{' <' if look.layer == found.suggested else ''}",
            f"{look.on_image:.1%}",
            f"{look.by_question:.1%}" if found.questions else "-",
            f"{look.by_image:.1%}" if found.images else "-",
        )
        for look in found.looks
    ]
    return text_table([HEADS, *rows])


def _conclusion(found: LayerLooks) -> str:
    measured = f"{found.teacher}: {found.questions} other questions, {found.images} other images"
    if found.suggested is None:
        return f"{measured}; no layer is suggested: {found.why}"
    limit = "" if found.wipe_layer is None else f" of those before the twig's wipe_layer {found.wipe_layer}"
    return (
        f"{measured}; suggested: layer {found.suggested}, the one{limit} whose attention to the image the question "
        "moves most"
    )
