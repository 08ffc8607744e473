"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def print_table(rows: Sequence[Mapping[str, object]], *, num_text_columns: int = 1) -> None:
    """Print a line for each row, below the names of the first; text columns come first, figures are right-aligned."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number < num_text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    # As wide as it needs, also where the output goes into a file.
    Console(width=400, highlight=False, markup=False, emoji=False).print(table)
