"""Annotations and images to WebDataset shards; image bytes are unchanged.

Samples are ordered by the first appearance of their image. All samples of an image are adjacent, and in one shard if
one shard can hold them and their images fit into `MAX_BYTES`. A text-only sample keeps its place. A source that holds
the images itself, such as Parquet, keeps the order of all its samples. The same input gives the same bytes.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pipeline.data.decoding import MAX_IMAGE_PIXELS
from pipeline.data.file_names import expand_home
from pipeline.errors import BadSample, PackError
from pipeline.packing.again import replacing, settle
from pipeline.packing.annotations import BadRecord, Record, read_annotations
from pipeline.packing.folder import (
    IMAGES,
    Pack,
    PackSummary,
    begin_pack,
    finish_pack,
    finished_pack,
    refuse_rejects,
    was_interrupted,
)
from pipeline.packing.images import UNREADABLE, Image, ImageFile, PackedImages, read_images, state_of
from pipeline.packing.shard_writer import ShardWriter
from pipeline.packing.sources import Source, open_source
from pipeline.packing.worklist import Worklist

MAX_BYTES = 128 << 20  # of images in memory at once, if no entry alone has more


def pack(
    annotations: str | Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    subset: str | None = None,
    split: str | None = None,
    samples_per_shard: int = 1000,
    on_bad_sample: Literal["reject", "fail"] = "reject",
    max_pixels: int = MAX_IMAGE_PIXELS,
    again: bool = False,
    allow_fewer: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> PackSummary:
    """Write `shard-000000.tar`, ..., `rejects.jsonl` and, last, `pack.json` into `output`.

    `annotations` are a path or a Hub id (see `open_source`); image paths start from `image_folder`, by default the
    annotations' own. A finished pack of the same input stays; rejected entries whose images were repaired are added
    in new shards. An unfinished pack is started anew. `again` packs everything again and replaces the finished pack,
    even one of other input; if it would hold fewer samples, only with `allow_fewer`. `progress` gets how many of the
    entries to pack are done, and how many there are, None where nobody knows. Raises `PackError` for input that
    cannot be packed and, with "fail", after listing bad entries.
    """
    output = expand_home(output)
    inputs = expand_home(annotations)
    if inputs.is_dir() and output.resolve().is_relative_to(inputs.resolve()):
        raise PackError(
            f"{output} lies in the folder of the annotations, and would change it; name one outside of it."
        )
    source = open_source(annotations, subset=subset, split=split)
    image_folder = source.folder if image_folder is None else expand_home(image_folder)
    asked = _asked(source, image_folder, samples_per_shard, on_bad_sample, max_pixels)
    if settle(output):
        say(f"{output}: the pack that an interrupted --again had finished is in place now")
    with replacing(output, again=again, allow_fewer=allow_fewer) as place:
        found = None if again else finished_pack(output, asked)
        lines = _repaired_lines(found.rejects(), image_folder) if found else None
        if found and found.summary and not lines and not was_interrupted(output):
            nothing = "nothing was done; --again packs everything again"
            say(f"{output} holds a finished pack of this input: {nothing}")
            return found.summary
        if lines is not None:
            noun, verb = ("entry", "is") if len(lines) == 1 else ("entries", "are")
            retried = f"{len(lines)} rejected {noun} whose images changed {verb} tried again"
            say(f"{retried}; what is packed stays as it is")
        contents = found or Pack(PackedImages(place / IMAGES))
        begin_pack(place, asked, keep=contents.shards)
        with Worklist(place) as work, contents.images:
            _Packing(place, contents, work, image_folder, asked, progress).run(source, lines)
            return finish_pack(place, asked, contents, work)


def _repaired_lines(rejects: Iterable[BadRecord], image_folder: Path) -> set[int]:
    """Return the lines of the rejected entries with an image that is there now and has changed."""
    return {
        bad.line
        for bad in rejects
        if any(state_of(image, image_folder) not in (None, state) for image, state in bad.images.items())
    }


class _Packing:
    """A run that writes entries into new shards of a pack."""

    def __init__(
        self,
        place: Path,
        contents: Pack,
        work: Worklist,
        image_folder: Path,
        asked: Mapping[str, Any],
        progress: Callable[[int, int | None], None],
    ) -> None:
        self.place, self.contents, self.work, self.image_folder = place, contents, work, image_folder
        self.limit, self.max_pixels = asked["samples_per_shard"], asked["max_pixels"]
        self.fails, self.progress = asked["on_bad_sample"] == "fail", progress

    def run(self, source: Source, lines: set[int] | None) -> None:
        """Pack the entries, of a finished pack those with the given lines; the rejects of the others stay."""
        if lines is not None:
            for bad in self.contents.rejects():
                if bad.line not in lines:
                    self.work.reject(bad)
        records = self._records(source, lines)
        if source.holds_images:
            groups, total = ([record] for record in records), None
        else:
            for number, record in enumerate(records, start=1):
                self.work.add(record)
                self.progress(number, None)
            groups, total = self.work.groups(self.limit), self.work.num_records
        self._refuse()
        with closing(
            ShardWriter(self.place, samples_per_shard=self.limit, shards=self.contents.shards)
        ) as writer:
            num_done = 0
            for group in groups:
                for samples in self._samples(group):
                    writer.write(samples)
                self._refuse()
                num_done += len(group)
                self.progress(num_done, total)
            writer.finish()
        self._refuse()

    def _records(self, source: Source, lines: set[int] | None) -> Iterator[Record]:
        """Yield the good entries, and put the bad ones on the list of rejects."""
        for entry in read_annotations(source, self.image_folder, self.work.count):
            if lines is not None and entry.line not in lines:
                continue
            if isinstance(entry, Record):
                yield entry
            else:
                self.work.reject(entry)

    def _refuse(self) -> None:
        if self.fails:
            refuse_rejects(self.place, self.work)

    def _samples(self, group: list[Record]) -> Iterator[list[tuple[str, dict[str, bytes]]]]:
        """Yield key and members of the good records, in several lists where images do not fit into `MAX_BYTES`.

        An image is read once for each list.
        """
        files: dict[Image, ImageFile] = {}
        errors: dict[Image, BadSample] = {}
        listed: set[Image] = set()
        samples: list[tuple[str, dict[str, bytes]]] = []
        for record in group:
            wanted = [image for image in record.images if image not in files and image not in errors]
            good, bad = read_images(wanted, self.image_folder, self.max_pixels)
            files |= good
            errors |= bad
            if any(image in errors for image in record.images):
                self._reject(record, errors)
                continue
            for image in record.images:
                if isinstance(image, str) and image not in listed:
                    listed.add(image)
                    self.contents.images.add(image, files[image])
            members = _members(record, [files[image] for image in record.images])
            samples.append((key_of_id(record.id, record.repeat), members))
            if sum(len(file.data) for file in files.values()) > MAX_BYTES:
                yield samples
                files, samples = {}, []
        yield samples

    def _reject(self, record: Record, errors: Mapping[Image, BadSample]) -> None:
        bad = {image: errors[image] for image in record.images if image in errors}
        # Size and time do not show who may read a file: without a state, it is tried on every run.
        states = {
            image: None if error.kind == UNREADABLE else state_of(image, self.image_folder)
            for image, error in bad.items()
            if isinstance(image, str)
        }
        first = next(iter(bad.values()))
        self.work.reject(BadRecord(record.id, record.line, first.kind, first.detail, states))


def _members(record: Record, images: list[ImageFile]) -> dict[str, bytes]:
    """Return ending -> bytes: "json", then "jpg" for one image, or "0.jpg", "1.png", ... for several."""
    number = "" if len(images) == 1 else "{}."
    named = {f"{number.format(n)}{image.ending}": image.data for n, image in enumerate(images)}
    return {"json": record.json, **named}


def key_of_id(identity: str, repeat: int = 1) -> str:
    """Return an id as a WebDataset key: percent-encoded, without the "/" and "." that would split it.

    The second entry with an id gets the suffix "+2", and so on; in an id itself "+" is encoded.
    """
    key = urllib.parse.quote(identity, safe="").replace(".", "%2E")
    return key if repeat == 1 else f"{key}+{repeat}"


def _asked(
    source: Source, image_folder: Path, samples_per_shard: int, policy: str, max_pixels: int
) -> dict[str, Any]:
    """Return what identifies a pack's input; raises `PackError` for what cannot be packed."""
    if not image_folder.is_dir():
        raise PackError(f"No image folder at {image_folder}; name the folder that image paths start from.")
    if samples_per_shard < 1:
        raise PackError(f"samples_per_shard must be at least 1, found {samples_per_shard}; 1000 is usual.")
    if policy not in ("reject", "fail"):
        raise PackError(f"on_bad_sample: unknown value {policy!r}; known are reject, fail.")
    return {
        "annotations": source.digest(),
        "image_folder": str(image_folder.resolve()),
        "samples_per_shard": samples_per_shard,
        "on_bad_sample": policy,
        "max_pixels": max_pixels,
    }
