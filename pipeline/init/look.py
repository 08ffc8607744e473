"""What a folder of somebody's data holds: shards, or annotations and the folder that their images lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.dialogues import read_dialogue
from pipeline.data.forms import form_of
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import parse_record
from pipeline.errors import BadSample, ConfigError, PackError
from pipeline.packing.images import image_of
from pipeline.packing.sources import open_source
from pipeline.packing.text_files import has_text_files

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
SAVED = ("state.json", "dataset_dict.json")  # of a folder that `datasets` saved
EXAMPLE = '{"image": "1.jpg", "caption": "A red circle."}'
TRIED = 20  # entries of a file that are read to see whether it holds conversations


@dataclass(frozen=True)
class Found:
    """Shards, or annotations with the form of their entries and the folder that image paths start from."""

    shards: tuple[str, ...] = ()
    annotations: Path | None = None
    form: str = ""
    image_folder: Path | None = None


def look(place: Path) -> Found:
    """Return what there is to train on in a folder, or in a file of annotations.

    Raises `ConfigError` if there is nothing, or several files of annotations of which one must be named.
    """
    if not place.exists():
        raise ConfigError(f"{place}: no such file or folder; name the folder of your images and annotations")
    if place.is_dir() and any(place.glob("*.tar")):
        return Found(shards=tuple(expand_shards(str(place))))
    readable = {file: form for file in _candidates(place) if (form := _form(file, is_named=file == place))}
    if len(readable) > 1:
        names = ", ".join(str(file) for file in readable)
        raise ConfigError(f"{place} holds several files of conversations: {names}; name one of them instead")
    for file, form in readable.items():
        return Found(annotations=file, form=form, image_folder=_image_folder(file, place))
    raise ConfigError(
        f"{place} holds neither shards (.tar) nor a file with conversations ({', '.join(ENDINGS)}), nor images with "
        f"a .txt beside each; write a file such as captions.jsonl with a line for each image: {EXAMPLE}; "
        "docs/data.md shows other forms"
    )


def _candidates(place: Path) -> list[Path]:
    if place.is_file() or has_text_files(place) or any((place / name).is_file() for name in SAVED):
        return [place]
    files = [
        file for depth in ("*", "*/*") for file in sorted(place.glob(depth)) if file.suffix.lower() in ENDINGS
    ]
    # Parquet files of one folder are one data set.
    return list(dict.fromkeys(file.parent if file.suffix.lower() == ".parquet" else file for file in files))


def _form(annotations: Path, *, is_named: bool) -> str:
    """Return the form of the first entry that is a conversation; "" if none of the first ones is.

    Raises `PackError` for annotations that cannot be read if the user named them.
    """
    try:
        for entry in _entries(annotations):
            if isinstance(entry, dict):
                try:
                    read_dialogue(entry)
                except BadSample:
                    continue
                return form_of(entry)
    except PackError:
        if is_named:
            raise
    return ""


def _entries(annotations: Path) -> Iterator[Any]:
    for _, entry in islice(open_source(annotations).entries(), TRIED):
        try:
            yield parse_record(entry) if isinstance(entry, bytes) else entry
        except BadSample:
            continue


def _image_folder(annotations: Path, place: Path) -> Path:
    """Return the folder below which most images of the first entries are found."""
    top = place if place.is_dir() else place.parent
    folders = [annotations.parent, top, *(folder for folder in sorted(top.glob("*")) if folder.is_dir())]
    entries = [entry for entry in _entries(annotations) if isinstance(entry, dict)]
    return max(dict.fromkeys(folders), key=lambda folder: sum(_num_found(entry, folder) for entry in entries))


def _num_found(entry: dict[str, Any], folder: Path) -> int:
    try:
        images = [image_of(image, folder) for image in read_dialogue(entry).images]
    except BadSample:
        return 0
    return sum(isinstance(image, str) and (folder / image).is_file() for image in images)
