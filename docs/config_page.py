"""The page docs/config.md: every key of a config, from the models that check it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config.config import Config
from pipeline.config.held_out import OF_HELD_OUT
from pipeline.config.training_arguments import HOW_IT_RUNS, OF_THE_LOG, OURS
from pipeline.settings import Section

READERS = ("stage 1", "stage 2", "evaluate")
PARTS = ("store", "run")
DESCRIPTION = re.compile(r"(?P<meaning>.+) \[(?P<tags>[^\[\]]+)\]")
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
BOUNDS = {"ge": "from {:,}", "gt": "above {:,}", "le": "to {:,}", "lt": "below {:,}"}

HEAD = """\
# The config

Every key of the YAML that `--config` takes. `python -m docs.generate` writes this page from the models that check a
config; change their docstrings in `pipeline/config/`, `pipeline/targets/` and `pipeline/losses/`, not this page.

- **Read by** names the work that reads a key. `stage 1` is `alignkd teacher-cache`. `stage 2` is `alignkd distill`,
  with the evaluation at its end. `evaluate` is `alignkd evaluate`. Other commands read what the stage reads that they
  plan, check or show.
- **Part of** says what a changed value changes. `store`: the key is in the store's fingerprint. Stage 2 refuses the
  store, and stage 1 must write another. `run`: the key is in a training's identity. A run with another value is
  another training: it does not resume the old one, and does not take it for finished. Of a path, only what lies there
  counts.
- A key without a default must be set.
- `--print-config` prints a config with its defaults. An override such as `losses.attention.weight=0.5` sets a key.
"""

COLUMNS = """\
| key | takes | default | meaning | read by | part of |
|---|---|---|---|---|---|"""

TRAIN = """\
## train

[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments), by
their own names and with transformers' own defaults. Stage 2 reads them. They are part of the run, except

- how a run is logged and saved: {log};
- when held-out losses are computed, unless `load_best_model_at_end` or the schedule uses them: {held_out};
- how the work is cut up: {cut}. The samples of a step (batch size x accumulation x processes) are part of the run.

Some are refused:

| keys | why, or what to do |
|---|---|
{refused}
"""


@dataclass(frozen=True)
class Key:
    """A key that holds a value: its row of the table."""

    name: str
    takes: str
    unit: str
    default: str
    meaning: str
    readers: tuple[str, ...]
    parts: tuple[str, ...]

    @classmethod
    def of(cls, name: str, field: FieldInfo) -> Key:
        """Read a field's type, default and docstring. Raises `ValueError` if the docstring has another form."""
        found = DESCRIPTION.fullmatch(" ".join((field.description or "").split()))
        if found is None:
            raise ValueError(f"{name}: expected a docstring 'Meaning. [unit; readers; parts]' below the key")
        tags = [tuple(tag.split(", ")) for tag in found["tags"].split("; ")]
        unit = "" if set(tags[0]) <= set(READERS) else ", ".join(tags.pop(0))
        readers, parts = tags[0] if tags else (), tags[1] if len(tags) > 1 else ()
        if not readers or not set(readers) <= set(READERS) or not set(parts) <= set(PARTS) or len(tags) > 2:
            raise ValueError(f"{name}: expected [unit; readers; parts], found [{found['tags']}]")
        takes = _type(field.annotation) + _bounds(field.metadata)
        if ("number" in takes) != bool(unit):
            raise ValueError(f"{name}: it takes {takes}, and its unit is {unit!r}; numbers alone have one")
        return cls(name, takes, unit, _default(field), found["meaning"], readers, parts)

    @property
    def row(self) -> str:
        takes = f"{self.takes}; {self.unit}" if self.unit else self.takes
        return _row(
            self.name, takes, self.default, self.meaning, ", ".join(self.readers), ", ".join(self.parts)
        )


def config_page() -> str:
    """The page: a table of the keys of each section, those of a section before its inner sections."""
    return "\n".join([HEAD, *_sections("", Config), _train()])


def keys_of(section: type[Section]) -> Iterator[Key]:
    """Yield the keys of a section that hold values."""
    for name, field in section.model_fields.items():
        if inner_section(field) is None:
            yield Key.of(name, field)


def sections_of(path: str, section: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Yield a section and all inside it, each with its dotted path."""
    yield path, section
    for name, field in section.model_fields.items():
        if (inner := inner_section(field)) is not None:
            yield from sections_of(f"{path}.{name}".strip("."), inner)


def inner_section(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, or a list of which it holds; None for a field with a value."""
    return next((kind for kind in _leaves(field.annotation) if issubclass(kind, Section)), None)


def _sections(path: str, section: type[Section]) -> Iterator[str]:
    for where, inner in sections_of(path, section):
        rows = [key.row for key in keys_of(inner)]
        rows += [
            _row_of_section(where, name, field, kind)
            for name, field in inner.model_fields.items()
            if (kind := inner_section(field)) is not None
        ]
        heading = f"## {where}\n\n" if where else ""
        yield f"{heading}{' '.join((inner.__doc__ or '').split())}\n\n{COLUMNS}\n" + "\n".join(rows) + "\n"


def _row_of_section(path: str, name: str, field: FieldInfo, section: type[Section]) -> str:
    where = f"{path}.{name}".strip(".")
    is_list = any(get_origin(kind) is list for kind in _alternatives(field.annotation))
    takes = "list of sections" if is_list else "section"
    first_line = (section.__doc__ or "").partition("\n")[0]
    return _row(name, f"[{takes}](#{where.replace('.', '')})", _default(field), first_line, "", "")


def _train() -> str:
    groups = (OF_THE_LOG, OF_HELD_OUT, HOW_IT_RUNS)
    log, held_out, cut = (", ".join(f"`{name}`" for name in names) for names in groups)
    refused = "\n".join(
        f"| {', '.join(f'`{name}`' for name in OURS if OURS[name] == why)} | {why} |"
        for why in dict.fromkeys(OURS.values())
    )
    return TRAIN.format(log=log, held_out=held_out, cut=cut, refused=refused)


def _row(name: str, *cells: str) -> str:
    return f"| {' | '.join((f'`{name}`', *cells))} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default()
    if isinstance(value, Section):
        return "its defaults"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _alternatives(annotation: Any) -> list[Any]:
    """Return the types of a union, each without what stands beside it in `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in _alternatives(one)]
    return [annotation]


def _leaves(annotation: Any) -> Iterator[type]:
    """Yield the classes of which an annotation is made."""
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and get_origin(kind) is None:
            yield kind
        elif get_origin(kind) is not Literal:
            for inner in get_args(kind):
                yield from _leaves(inner)


def _type(annotation: Any) -> str:
    """Return in words what a key takes."""
    return " or ".join(_words(kind) for kind in _alternatives(annotation))


def _words(kind: Any) -> str:
    arguments = get_args(kind)
    if kind is Any:
        return "any value"
    if kind is NoneType:
        return "null"
    if get_origin(kind) is Literal:
        return _or([f"`{choice}`" for choice in arguments])
    if get_origin(kind) is list:
        return f"list of {_type(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"[{', '.join(map(_type, arguments))}]"
    if get_origin(kind) is dict:
        return f"({_type(arguments[1])}) by name"
    return KINDS[kind]


def _or(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))


def _bounds(metadata: Sequence[Any]) -> str:
    said = [word.format(bound) for one in metadata for name, word in BOUNDS.items()
            if (bound := getattr(one, name, None)) is not None]  # fmt: skip
    return ", " + " ".join(said) if said else ""
