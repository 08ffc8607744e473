"""Writes docs/cli.md from the command line itself: `python -m docs.generate`. A test compares the two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from cli import app

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100

HEAD = """\
# The command line

Written by `python -m docs.generate` from `alignkd --help`; change `pipeline/commands/`, not this page.
Results go to stdout, progress and errors to stderr.
"""


def cli_page() -> str:
    """The page: the help of the program and of each command, at a fixed width."""
    group = typer.main.get_command(app)
    return "\n".join([HEAD, _help(group, "alignkd"), *_sections(group, "")])


def _sections(group: typer.core.TyperGroup, above: str) -> Iterator[str]:
    """A heading and the help of every command, those of a group after the group's own."""
    for name, command in group.commands.items():
        yield f"## {above}{name}\n"
        yield _help(command, f"alignkd {above}{name}")
        if isinstance(command, typer.core.TyperGroup):
            yield from _sections(command, f"{above}{name} ")


def _help(command: typer.core.TyperCommand | typer.core.TyperGroup, name: str) -> str:
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"```text\n{command.get_help(context).rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(cli_page())
