"""The emoji art: four icon packs joined on emojibase's labels into one table concept x style, and its licences.

The packs are npm tarballs as `npm pack` leaves them in one folder; they are read there, nothing is unpacked.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import ConfigError
from pipeline.studies.emoji.concepts import Concept

SEEN_STYLES = ("noto", "twemoji", "openmoji")
UNSEEN_STYLE = "fluent-emoji-flat"
STYLES = (*SEEN_STYLES, UNSEEN_STYLE)
NAMES = "emojibase-data"

LICENSES = """\
# Whose work the pictures are

The scenes beside this file are made of emoji drawn by four artists' teams, as packed by Iconify, set on plain
backgrounds. Each picture shows one style; its file name says which.

{rows}

Names of the emoji: emojibase-data (MIT). Pictures that show OpenMoji's art are adaptations of it: share them under
CC BY-SA 4.0. Changes made: the icons were scaled and placed on coloured backgrounds, nothing else.
"""


@dataclass(frozen=True)
class Art:
    """SVG text of every concept in every style: (name, style) -> SVG."""

    drawings: dict[tuple[str, str], str]
    licenses: str

    def draw(self, name: str, style: str, *, size_pixels: int) -> Image.Image:
        """The concept as RGBA, `size_pixels` wide and high. Raises `ConfigError` without resvg-py."""
        try:
            import resvg_py  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                "drawing emoji needs the package resvg-py, which is not installed; run `make emoji`, or "
                "`pip install 'alignkd[emoji]'`"
            ) from error
        png = resvg_py.svg_to_bytes(
            svg_string=self.drawings[name, style],
            width=size_pixels,
            height=size_pixels,
            skip_system_fonts=True,
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def read_art(folder: Path, concepts: Sequence[Concept]) -> Art:
    """Every concept's drawing in every style. Raises `ConfigError` naming the pack or the concept that lacks."""
    hexcodes = {entry["label"]: entry["hexcode"].lower() for entry in _read(folder, NAMES, "en/data.json")}
    drawings: dict[tuple[str, str], str] = {}
    rows = []
    for style in STYLES:
        icons, characters, about = (
            _read(folder, f"iconify-json-{style}", f"{part}.json") for part in ("icons", "chars", "info")
        )
        rows.append(_license_row(style, about))
        for concept in concepts:
            icon = _icon_name(concept, hexcodes, characters)
            if icon is None:
                raise ConfigError(
                    f"{folder}: the pack {style} has no emoji {concept.label!r}; use the versions of the packs "
                    "that the Makefile names"
                )
            drawings[concept.name, style] = _svg(icon, icons)
    return Art(drawings, LICENSES.format(rows="\n".join(rows)))


def _icon_name(concept: Concept, hexcodes: dict[str, str], characters: dict[str, str]) -> str | None:
    hexcode = hexcodes.get(concept.label, "")
    # Packs differ in whether they write the selector of the coloured form.
    return characters.get(hexcode) or characters.get(hexcode.replace("-fe0f", ""))


def _svg(name: str, icons: dict[str, Any]) -> str:
    """An icon as a whole SVG file: aliases followed, size as the icon or else its pack has it."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = " ".join(
        str(icon.get(part, icons.get(part, default)))
        for part, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}">{icon["body"]}</svg>'


def _license_row(style: str, about: dict[str, Any]) -> str:
    author, license = about["author"], about["license"]
    return f"- {style}: {author['name']}, {author['url']}. {license['title']}, {license['url']}"


def _read(folder: Path, package: str, file: str) -> Any:
    """A JSON file of a package's tarball."""
    tarballs = sorted(folder.glob(f"{package}-[0-9]*.tgz"))
    if len(tarballs) != 1:
        raise ConfigError(
            f"{folder}: expected one tarball of the npm package {package}, found {len(tarballs)}; "
            "run `make emoji`, which fetches it"
        )
    try:
        with tarfile.open(tarballs[0]) as tar:
            member = tar.extractfile(f"package/{file}")
            assert member is not None
            return json.load(member)
    except (OSError, KeyError, ValueError, EOFError, tarfile.TarError) as error:
        raise ConfigError(
            f"{tarballs[0]}: {file} cannot be read ({type(error).__name__}); remove the tarball and run `make emoji`"
        ) from error
