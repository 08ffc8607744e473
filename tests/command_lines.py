"""Checks that a command line in a text would be understood: command, options, make target, config and overrides."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import typer

import cli
from pipeline.config.config import load_config

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
MAKE_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))
MAKE_VARIABLES = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, flags=re.MULTILINE))


def check_line(line: str) -> None:
    """Parse a shell line with the parsers that would meet it, and load the config that it names.

    A program that is none of ours is let pass. Raises whatever the parser or the config says.
    """
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if "cli.py" in words:  # by way of a launcher
        words = ["alignkd", *words[words.index("cli.py") + 1 :]]
    if words[:1] == ["alignkd"]:
        _check_alignkd(words[1:])
    elif words[:1] == ["make"]:
        _check_make(words[1:])
    elif words[:2] == ["python", "-m"]:
        module = importlib.import_module(words[2])
        if hasattr(module, "app"):
            _parse(module.app, words[3:])


def _check_alignkd(words: list[str]) -> None:
    parameters = _parse(cli.app, words)
    if parameters.get("config"):
        load_config(ROOT / parameters["config"], parameters.get("overrides") or [])


def _check_make(words: list[str]) -> None:
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = {word for word in words if "=" not in word}
    assert targets <= MAKE_TARGETS, f"make has no target {targets - MAKE_TARGETS}"
    assert variables.keys() <= MAKE_VARIABLES, f"make reads no {variables.keys() - MAKE_VARIABLES}"
    load_config(ROOT / variables.get("CONFIG", "configs/demo.yaml"), variables.get("ARGS", "").split())


def _parse(app: typer.Typer, words: list[str]) -> dict:
    """Parameters by name; raises a usage error for an unknown command or option, or a missing argument."""
    command = typer.main.get_command(app)
    context = command.make_context("it", list(words))
    rest = list(words)
    while isinstance(command, typer.core.TyperGroup):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context.params
