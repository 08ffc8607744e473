"""Writes docs/cli.md from the command line, docs/config.md from the models that check a config, and the tables of
docs/experiments.md from the sweeps' own lines.

`python -m docs.generate`; a test compares. A table stands below `<!-- sweep FOLDER -->`, the folder of a sweep's
`runs.jsonl`, `questions.json` and `teacher.json`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer

from cli import app
from docs.config_page import config_page
from pipeline.sweep.lines import read_lines
from pipeline.sweep.summary import summarise_sweep, summary_tables

DOCS = Path(__file__).parent
PAGE = DOCS / "cli.md"
CONFIG = DOCS / "config.md"
EXPERIMENTS = DOCS / "experiments.md"
TABLE = re.compile(r"(<!-- sweep (?P<folder>[\w/-]+) -->\n```text\n)(?P<table>.*?)(?=^```$)", re.M | re.S)
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


def experiments_page() -> str:
    """The page as it is, with every table made anew."""
    return TABLE.sub(lambda found: found[1] + sweep_table(DOCS / found["folder"]), EXPERIMENTS.read_text())


def sweep_table(folder: Path) -> str:
    """The tables that `alignkd sweep` prints, from the lines that it left."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        lines = {line["name"]: line for line in read_lines(folder)}
        return summary_tables(summarise_sweep(Path(copy), lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(cli_page())
    CONFIG.write_text(config_page())
    EXPERIMENTS.write_text(experiments_page())
