"""A record's dialogue, in the form of whatever tool wrote it, as turns with an <image> for each image."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.conversation import check_conversations
from pipeline.data.forms import CAPTIONS, FORMS, form_of
from pipeline.data.media import check_media
from pipeline.data.templates import IMAGE_TOKEN, Turn
from pipeline.data.unread import check_entry, check_marks
from pipeline.errors import BadSample

ROLES = {
    "human": "human", "user": "human",
    "gpt": "gpt", "assistant": "gpt", "model": "gpt",
    "system": "system", "developer": "system",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
PLACES = (
    "image",
    "image_url",
    "url",
    "path",
    "base64",
    "source",
)  # keys of an image part that say where the image is
ELSEWHERE = (
    "file_id",
    "file",
    "filename",
    "data",
    "bytes",
    "image_base64",
    "inline_data",
)  # and what is not read
COLUMNS = ("image", "images")  # keys of a record that hold its images; the first one that names any counts
SYSTEM = ("system", "system_prompt")  # keys of a record that hold its system turn
INLINE = re.compile(r"<img>([^<>\n]+)</img>")  # an image in a text of Qwen-VL and ms-swift
NEXT = object()  # stands for the next image of the record's column


@dataclass(frozen=True)
class Dialogue:
    """The turns of a record, and its images in the order of their <image>, as the record names them.

    `is_llava` is whether the record is written so itself. `keys` are those that its turns were read from, `column` is
    the one of its images, "" if no image was read from one.
    """

    turns: list[Turn]
    images: tuple[Any, ...]
    is_llava: bool
    keys: frozenset[str]
    column: str

    def metadata(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record without its turns."""
        return {name: value for name, value in record.items() if name not in self.keys}


def read_dialogue(record: Mapping[str, Any], images: Sequence[Any] | None = None) -> Dialogue:
    """Return the dialogue of a record. `images` are those that lie beside it, as in a shard; else it names its own.

    Where the text of another form than LLaVA's says no place for any image, they stand before the first question, as
    TRL and Idefics have it. Raises `BadSample` for a record without a dialogue, for turns that do not alternate, and
    unless each image has its place in the text.
    """
    form = form_of(record)
    check_entry(record)
    column, given = _column(record) if images is None else ("", list(images))
    turns, marks = _turns(record, form)
    if images is not None:
        marks = [NEXT] * len(marks)
    is_llava = form == "conversations" and all(_is_llava(turn) for turn in record[form])
    if not is_llava:
        for number, turn in enumerate(turns, start=1):
            check_marks(turn["value"], number)
        if given and not marks:
            marks = [NEXT] * len(given)
            _put_first(turns, len(given))
    if form in CAPTIONS and not marks:
        raise BadSample("caption without an image", f"{form} is an image's caption here; name it in `image`")
    num_own = sum(mark is not NEXT for mark in marks)
    check_conversations(turns, num_images=num_own + (len(given) if NEXT in marks or not marks else 0))
    if marks and all(mark is not NEXT and not isinstance(mark, int) for mark in marks):
        column = ""  # every image stands in the text itself
    check_media(record, FORMS[form].keys, num_images=len(marks), known=column)
    keys = frozenset((*FORMS[form].keys, *SYSTEM))
    return Dialogue(turns, _filled(marks, given), is_llava, keys, column)


def _turns(record: Mapping[str, Any], form: str) -> tuple[list[Turn], list[Any]]:
    """Return the turns, and for each <image> in them its own image, its number in the column, or NEXT."""
    turns: list[Turn] = []
    marks: list[Any] = []
    utterances = list(FORMS[form].utterances(record))
    utterances[:0] = [("system", record[key]) for key in SYSTEM if record.get(key)]
    for number, (role, content) in enumerate(utterances, start=1):
        text, found = _content(content, number)
        marks += found
        if (known := _role(role, number)) != "system" or text:
            turns.append({"from": known, "value": text})
    return turns, marks


def _is_llava(turn: Mapping[str, Any]) -> bool:
    return isinstance(turn.get("value"), str) and not INLINE.search(turn["value"])


def _role(role: Any, number: int) -> str:
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        expected = ", ".join(ROLES)
        raise BadSample(
            "unknown role", f"turn {number} is from {str(role)[:50]!r}, must be one of {expected}"
        )
    return known


def _content(content: Any, number: int) -> tuple[str, list[Any]]:
    """Return the text of a content with an <image> for each image, and what each of them is."""
    parts = content if isinstance(content, list | tuple) else [content]
    if len(parts) > 1 and any(isinstance(part, str) for part in parts):
        raise BadSample(
            "several texts for one turn", f"turn {number} is {reprlib.repr(content)}; name one of them"
        )
    texts: list[str] = []
    marks: list[Any] = []
    for part in parts:
        kind = _kind(part)
        text = part.get("text") if isinstance(part, dict) else part
        if kind in IMAGE_PARTS:
            texts.append(IMAGE_TOKEN)
            marks.append(_image(part))
        elif isinstance(text, str) and text.startswith(('[{"type":', '[{"text":')):
            raise BadSample(
                "malformed turn", f"turn {number} is a JSON text of its parts; write the parts themselves"
            )
        elif kind in TEXT_PARTS and isinstance(text, str):
            texts.append(INLINE.sub(IMAGE_TOKEN, text))
            places = re.finditer(f"{IMAGE_TOKEN}|{INLINE.pattern}", text)
            marks += [place[1] or NEXT for place in places]
        elif kind in TEXT_PARTS:
            raise BadSample("malformed turn", f"turn {number} has no text, found {reprlib.repr(text)}")
        else:
            raise BadSample(
                "media without a placeholder", f"turn {number} has a part of type {str(kind)[:50]!r}"
            )
    return "".join(texts), marks


def _kind(part: Any) -> Any:
    """Return the type of a part; one that names none, as Qwen-VL has them, is of the type of its first key."""
    if not isinstance(part, dict):
        return "text"
    return part.get("type") or next((key for key, value in part.items() if value is not None), None)


def _image(part: Mapping[str, Any]) -> Any:
    """Return the image of a part: what it names, else its number in the column, else NEXT."""
    for place in PLACES:
        value = part.get(place)
        if place in ("image_url", "source") and isinstance(value, dict):  # of OpenAI and of Anthropic
            place, value = ("base64", value["data"]) if value.get("data") else (place, value.get("url"))
        if value:
            return f"data:;base64,{value}" if place == "base64" else value
    if place := next((key for key in ELSEWHERE if part.get(key)), None):
        raise BadSample(
            "image is no path", f"a part of type image has {place}; name the image's path as image"
        )
    index = part.get("index")
    return index if isinstance(index, int) and not isinstance(index, bool) else NEXT


def _column(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return the key of a record that holds its images, and the images; "", [] if none does."""
    for key in COLUMNS:
        value = record.get(key)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not all(_is_none(image) for image in values):
            return key, values
    return "", []


def _is_none(image: Any) -> bool:
    """Return whether there is no image, as a table says it: None, "", or a struct whose fields are empty."""
    return not any(image.values()) if isinstance(image, dict) else image is None or image == ""


def _put_first(turns: list[Turn], num_images: int) -> None:
    """Put the marks of images before the first question."""
    for turn in turns:
        if turn["from"] == "human":
            turn["value"] = IMAGE_TOKEN * num_images + turn["value"]
            return


def _filled(marks: Sequence[Any], given: Sequence[Any]) -> tuple[Any, ...]:
    """Return the image of each mark. There are as many NEXT as images, or none."""
    coming = iter(given)
    images: list[Any] = []
    for mark in marks:
        if isinstance(mark, int) and not 0 <= mark < len(given):
            raise BadSample("<image> in the text, but no image", f"image {mark} of {len(given)} asked for")
        images.append(next(coming) if mark is NEXT else given[mark] if isinstance(mark, int) else mark)
    numbers = {mark for mark in marks if isinstance(mark, int)}
    if numbers and NEXT not in marks and (left := set(range(len(given))) - numbers):
        raise BadSample(
            "number of <image> differs from number of images", f"image {min(left)} is never shown"
        )
    return tuple(images)
