"""Requests of lmms-eval as prompts, answered as the suite's questions are; nothing here imports lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3
from PIL import Image, ImageOps

from pipeline.benchmarks.answering import Answerer, HowToAsk, NamedImage, Prompt
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.config.config import EvaluateConfig
from pipeline.data.preparation import Preparation
from pipeline.data.templates import IMAGE_TOKEN, Turn
from pipeline.errors import ConfigError, PipelineError, reason_of

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # what PNG holds as it is
DEFAULT_NEW_TOKENS = 128  # as TextVQA in the suite; lmms-eval's `textvqa_val` gives no number

Documents = Mapping[str, Mapping[str, Any]]  # task -> split -> documents by number


class Request(Protocol):
    """One `generate_until` request of a chat model, an `Instance` of lmms-eval."""

    @property
    def args(self) -> tuple[Any, ...]:
        """The context, a function from a document to messages, settings, the document's number, task and split."""
        ...


def how_to_ask(model: str, batch_size: int | str, dtype: str | None) -> HowToAsk:
    """Return the suite's settings with this batch size, and with a dtype if one is given."""
    if not str(batch_size).isdecimal():
        raise ConfigError(f"--batch_size {batch_size}: alignkd needs a number")
    chosen: Any = dtype or HowToAsk().dtype_for(model)
    return HowToAsk(evaluate=EvaluateConfig(shards="none", batch_size=int(batch_size), dtype=chosen))


@dataclass(frozen=True)
class RequestSettings:
    """What decides how a request is answered; requests of equal settings share a batch."""

    max_new_tokens: int
    crops: bool

    @classmethod
    def of(cls, request: Request) -> RequestSettings:
        """Return a request's settings. Raises `ConfigError` unless they ask for greedy decoding."""
        _, _, settings, _, task, _ = request.args
        _check_greedy(settings, task)
        most = settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        return cls(int(most), any(row.crops and task.startswith(row.name) for row in BENCHMARKS.values()))


def _check_greedy(settings: Mapping[str, Any], task: str) -> None:
    temperature, beams = settings.get("temperature") or 0, settings.get("num_beams") or 1
    samples = settings.get("do_sample", temperature > 0)
    if samples or beams > 1:
        raise ConfigError(
            f"task {task} asks for sampling or a beam (temperature {temperature}, num_beams {beams}), but alignkd "
            "decodes greedily; add --gen_kwargs temperature=0,do_sample=False,num_beams=1"
        )


@dataclass
class RequestAnswerer:
    """A checkpoint that answers requests of lmms-eval."""

    answerer: Answerer
    preparations: dict[bool, Preparation] = field(default_factory=dict)

    def answers(self, requests: Sequence[Request], documents: Documents) -> Iterator[tuple[int, str]]:
        """Yield the number of each request with its answer, cut where it is to end."""
        groups: dict[RequestSettings, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(RequestSettings.of(request), []).append(number)
        for how, numbers in groups.items():
            answer = self._asking(how)
            for batch in _batches(numbers, self.answerer.how.batch_size):
                prompts = [prompt_of_request(requests[number], documents) for number in batch]
                for number, text in zip(batch, answer(prompts), strict=True):
                    yield number, cut(text, requests[number].args[2].get("until"))

    def _asking(self, how: RequestSettings) -> Callable[[Sequence[Prompt]], list[str]]:
        if how.crops not in self.preparations:
            self.preparations[how.crops] = self.answerer.preparation_that(crops=how.crops)
        return self.answerer.asking(self.preparations[how.crops], max_new_tokens=how.max_new_tokens)


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """Return an answer up to the first of the texts that end it."""
    for end in [until] if isinstance(until, str) else until or ():
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def prompt_of_request(request: Request, documents: Documents) -> Prompt:
    """Return what a request asks: its messages as turns, and their images in order."""
    _, messages_of, _, number, task, split = request.args
    where = f"document {number} of {task}"
    messages = messages_of(documents[task][split][number])
    if not messages or messages[-1]["role"] != "user":
        raise PipelineError(f"{where}: its last message is not the user's; alignkd answers questions only")
    images: list[NamedImage] = []
    turns = [_turn(message, images, where) for message in messages]
    return Prompt(where, turns, images)


def _turn(message: Mapping[str, Any], images: list[NamedImage], where: str) -> Turn:
    """Return a message as a turn, and add its images to `images`."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] not in ("text", "image"):
            raise PipelineError(f"{where} holds {part['type']}; alignkd's models read images and text")
        if part["type"] == "image":
            images.append(_image(part["url"], where))
        elif IMAGE_TOKEN in part["text"]:
            raise PipelineError(
                f"{where}: its text holds {IMAGE_TOKEN}, which stands for an image; leave the task out"
            )
    return {"from": SPEAKERS[message["role"]], "value": _text(parts)}


def _text(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a turn; an image stands on a line of its own, as in LLaVA's data."""
    texts = [IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in parts]
    breaks = ["\n" if IMAGE_TOKEN in pair else "" for pair in pairwise(texts)]
    return "".join(text + end for text, end in zip(texts, [*breaks, ""], strict=True))


def _image(found: Any, where: str) -> NamedImage:
    """Return an image file's bytes by their digest: of a picture in memory, or of a path."""
    data = _png(found) if isinstance(found, Image.Image) else _file(found, where)
    return blake3(data).hexdigest(), data


def _png(picture: Image.Image) -> bytes:
    """Return a picture as PNG, turned as EXIF says: the same pixels as its file gives in the suite."""
    turned = ImageOps.exif_transpose(picture)
    turned = turned if turned.mode in LOSSLESS else turned.convert("RGB")
    file = io.BytesIO()
    turned.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _file(found: Any, where: str) -> bytes:
    if not isinstance(found, str | Path):
        raise PipelineError(
            f"{where}: its image is a {type(found).__name__}; alignkd reads pictures of Pillow and paths"
        )
    try:
        return Path(found).read_bytes()
    except OSError as error:
        raise PipelineError(f"{where}: its image {found} cannot be read ({reason_of(error)})") from error
