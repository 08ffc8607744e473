"""The card of a shared store (Markdown with a YAML head): contents, precision, loading, licence."""

from __future__ import annotations

import re

from cache import Pushed, Store, Summary, card_at, push_store, summarise
from pipeline.progress import Progress
from pipeline.readable import readable_bytes
from pipeline.upkeep.describe import teacher_size


def push_with_card(store: str, url: str, *, license: str | None) -> Pushed:
    """Send a store to a URL, with a card written from its summary.

    Without a `license` the card keeps the one of the card at the URL, if there is one.
    """
    source = Store(store)
    if not license:
        named = re.search(r"^license: (.+)$", card_at(url).partition("\n# ")[0], flags=re.MULTILINE)
        license = named[1] if named and named[1] != "other" else None
    card = cache_card(summarise(store), url=url, license=license)
    with Progress(f"push {url}", unit="bytes", doing="comparing with what is there") as progress:
        return push_store(source, url, card=card.encode(), progress=progress)


def cache_card(store: Summary, *, url: str, license: str | None) -> str:
    """Return the README.md of a store behind `url`."""
    teacher, missing = store.teacher, store.parts_planned - store.parts_done
    fingerprint = ", ".join(
        f"{name.replace('_', ' ')} `{digest[:16]}`" for name, digest in store.fingerprint.items()
    )
    arrays = "\n".join(
        f"| `{array.name}` | {array.axes} | {array.codec} | {array.stated_error.replace('|', '&#124;')} "
        f"| {readable_bytes(array.bytes)} | {readable_bytes(array.bytes_per_sample)} |"
        for array in store.arrays
    )
    target = next(iter(store.capture.get("targets", ())), "logits")
    return f"""\
---
license: {license or "other"}
tags: [alignkd, knowledge-distillation, vision-language, zarr]
---
# What {teacher.get("name", "a teacher")} computed, for distillation

{store.samples:,} samples with {store.distinct_images:,} images, {readable_bytes(store.bytes)} in \
{store.parts_done} parts, {readable_bytes(store.bytes_per_sample)} a sample. A Zarr v3 store of targets for Align-KD \
([arXiv 2412.01282](https://arxiv.org/abs/2412.01282)); the images and the text are not in it.

- **Teacher**: `{teacher.get("name", "?")}`, {teacher_size(teacher)}; computed in \
{store.capture.get("dtype", "an unknown dtype")}
- **Made**: {store.provenance.get("created", "at an unknown time")}; {store.rejected:,} samples rejected, \
{missing} of {store.parts_planned} planned parts not in it
- **Content**: `{store.content}`, which `alignkd info` prints of a whole copy too
- **Fingerprint**: {fingerprint}

## What is stored

| array | axes | codec | stated error | bytes | a sample |
|---|---|---|---|---|---|
{arrays}

## How to load it

```bash
alignkd info {url}
alignkd pull {url} teacher.zarr
alignkd pull {url} tenth.zarr --targets {target} --fraction 0.1
```

To train from it where it lies, set `cache.path: {url}` and `cache.mirror` to a local folder. Stage 2 needs the \
shards, tokenizer, template and image preprocessing that it was made with, and compares them.

## Licence

{f"Given away under {license}." if license else "Whoever pushed this store named no licence."} The values were \
computed by the teacher from images and text: the teacher's licence and the data's may bind whoever uses them.
"""
