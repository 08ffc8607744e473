"""The emoji art: four icon packs and their licences, joined on emojibase's labels into one table concept x style.

The packs are npm tarballs in one folder, as `npm pack` leaves them. They are read without being unpacked.
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

from pipeline.errors import ConfigError, needing
from pipeline.studies.emoji.scenes import BACKGROUNDS, IMAGE_SIZE, Concept, Scene

SEEN_STYLES = ("noto", "twemoji", "openmoji")
UNSEEN_STYLE = "fluent-emoji-flat"
STYLES = (*SEEN_STYLES, UNSEEN_STYLE)
NAMES = "emojibase-data"


@dataclass(frozen=True)
class Art:
    """SVG text of every concept in every style, (name, style) -> SVG, and the licences as Markdown."""

    drawings: dict[tuple[str, str], str]
    licenses: str

    def paint(self, scene: Scene, *, image_size: int = IMAGE_SIZE) -> Image.Image:
        """Return the scene as an RGB picture, `image_size` pixels wide and high."""
        image = Image.new("RGB", (image_size, image_size), BACKGROUNDS[scene.background])
        for thing in scene.things:
            emoji = self.draw(thing.concept.name, scene.style, size=thing.size)
            image.paste(emoji, (thing.left, thing.top), emoji)
        return image

    def draw(self, name: str, style: str, *, size: int) -> Image.Image:
        """Return the concept as RGBA, `size` pixels wide and high. Raises `ConfigError` without resvg-py."""
        with needing("emoji", by="drawing emoji", otherwise="run `make emoji`"):
            import resvg_py  # pyright: ignore[reportMissingImports]
        svg = self.drawings[name, style]
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def read_art(folder: Path, concepts: Sequence[Concept]) -> Art:
    """Read every concept's drawing in every style. Raises `ConfigError` naming a missing pack or concept."""
    hexcodes = {entry["label"]: entry["hexcode"].lower() for entry in _read(folder, NAMES, "en/data.json")}
    drawings: dict[tuple[str, str], str] = {}
    rows = []
    for style in STYLES:
        icons, characters, about = (
            _read(folder, f"iconify-json-{style}", f"{part}.json") for part in ("icons", "chars", "info")
        )
        author, license = about["author"], about["license"]
        rows.append(f"- {style}: {author['name']}, {author['url']}. {license['title']}, {license['url']}")
        for concept in concepts:
            hexcode = hexcodes.get(concept.label, "")
            # Packs differ in whether they write the selector of the coloured form.
            icon = characters.get(hexcode) or characters.get(hexcode.replace("-fe0f", ""))
            if icon is None:
                raise ConfigError(
                    f"{folder}: the pack {style} has no emoji {concept.label!r}; use the versions of the packs "
                    "that the Makefile names"
                )
            drawings[concept.name, style] = _svg(icon, icons)
    licenses = Path(__file__).with_name("LICENSES.md").read_text()
    return Art(drawings, licenses.format(rows="\n".join(rows)))


def _svg(name: str, icons: dict[str, Any]) -> str:
    """Return an icon as a whole SVG file, with aliases resolved; a size that it lacks is the pack's."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = {"left": 0, "top": 0, "width": 16, "height": 16} | icons | icons["icons"][name]
    box = " ".join(str(icon[part]) for part in ("left", "top", "width", "height"))
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}">{icon["body"]}</svg>'


def _read(folder: Path, package: str, file: str) -> Any:
    """Return the content of a JSON file in a package's tarball."""
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
