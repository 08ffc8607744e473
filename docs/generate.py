"""Writes docs/cli.md from the command line itself: `python -m docs.generate`. A test compares the two."""

from __future__ import annotations

from pathlib import Path

import typer

from cli import app

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100

HEAD = """\
# The command line

Written by `python -m docs.generate` from `alignkd --help`; change `cli.py`, not this page.
Results go to stdout, progress and errors to stderr.
"""


def cli_page() -> str:
    """The page: the help of the program and of each command, at a fixed width."""
    group = typer.main.get_command(app)
    sections = [HEAD, _help(group, "alignkd")]
    for name, command in group.commands.items():
        sections += [f"## {name}\n", _help(command, f"alignkd {name}")]
    return "\n".join(sections)


def _help(command: typer.core.TyperCommand | typer.core.TyperGroup, name: str) -> str:
    context = command.context_class(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"```text\n{command.get_help(context).rstrip()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(cli_page())
