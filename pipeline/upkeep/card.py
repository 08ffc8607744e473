"""The card of a shared store, Markdown with a YAML head: what it is, how exact, how to load it, its licence."""

from __future__ import annotations

import re
import sys

from tqdm import tqdm

from cache import Pushed, Store, Summary, card_at, push_store, summarise
from pipeline.upkeep.describe import readable_bytes


def push_with_card(store: str, url: str, *, license: str | None) -> Pushed:
    """Send a store to a URL with a card that is written from what the store says of itself.

    Without a `license` the card keeps the one that is named at the URL already.
    """
    source = Store(store)
    license = license or _license_of(card_at(url))
    card = cache_card(summarise(store), url=url, license=license)
    with tqdm(total=len(source.parts), unit="part", desc=f"push {url}", file=sys.stderr) as progress:
        return push_store(source, url, card=card.encode(), each=lambda part: progress.update())


def cache_card(store: Summary, *, url: str, license: str | None) -> str:
    """The README.md that lies beside a store behind `url`."""
    head = f"""\
---
license: {license or "other"}
tags: [alignkd, knowledge-distillation, vision-language, zarr]
---
# What {store.teacher["name"]} computed, for distillation
"""
    return (
        "\n".join([head, *_about(store), *_arrays(store), *_loading(store, url), *_licence(license)]) + "\n"
    )


def _license_of(card: str) -> str | None:
    named = re.search(r"^license: (.+)$", card.partition("\n# ")[0], flags=re.MULTILINE)
    return named[1] if named and named[1] != "other" else None


def _about(store: Summary) -> list[str]:
    teacher, missing = store.teacher, store.parts_planned - store.parts_done
    return [
        f"{store.samples:,} samples with {store.distinct_images:,} images, {readable_bytes(store.bytes)} in "
        f"{store.parts_done} parts, {readable_bytes(store.bytes_per_sample)} a sample. A Zarr v3 store of targets "
        "for Align-KD ([arXiv 2412.01282](https://arxiv.org/abs/2412.01282)); the images and the text are not in it.",
        "",
        f"- **Teacher**: `{teacher['name']}`, {teacher['num_layers']} layers, {teacher['num_heads']} heads, width "
        f"{teacher['hidden_size']}, {teacher['num_vision_tokens']} vision tokens; computed in "
        f"{store.capture['dtype']}",
        f"- **Made**: {store.provenance.get('created', 'at an unknown time')}; {store.rejected:,} samples rejected, "
        f"{missing} of {store.parts_planned} planned parts not in it",
        f"- **Content**: `{store.content}`, which `alignkd info` prints of a whole copy too",
        "- **Fingerprint**: "
        + ", ".join(
            f"{name.replace('_', ' ')} `{digest[:16]}`" for name, digest in store.fingerprint.items()
        ),
        "",
    ]


def _arrays(store: Summary) -> list[str]:
    rows = [
        f"| `{array.name}` | {array.axes} | {array.codec} | {array.stated_error.replace('|', '&#124;')} "
        f"| {readable_bytes(array.bytes)} | {readable_bytes(array.bytes_per_sample)} |"
        for array in store.arrays
    ]
    header = ["| array | axes | codec | stated error | bytes | a sample |", "|---|---|---|---|---|---|"]
    return ["## What is stored", "", *header, *rows, ""]


def _loading(store: Summary, url: str) -> list[str]:
    target = next(iter(store.capture["targets"]), "logits")
    return [
        "## How to load it",
        "",
        "```bash",
        f"alignkd info {url}",
        f"alignkd pull {url} teacher.zarr",
        f"alignkd pull {url} tenth.zarr --targets {target} --fraction 0.1",
        "```",
        "",
        f"To train from it where it lies, set `cache.path: {url}` and `cache.mirror` to a local folder. Stage 2 "
        "wants the shards, tokenizer, template and image preprocessing that it was made with, and compares them.",
        "",
    ]


def _licence(license: str | None) -> list[str]:
    named = f"Given away under {license}." if license else "Whoever pushed this store named no licence."
    note = (
        "The values were computed by the teacher from images and text: the teacher's licence and the data's may bind "
        "whoever uses them."
    )
    return ["## Licence", "", f"{named} {note}"]
