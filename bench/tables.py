"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table


def print_table(
    rows: Iterable[Mapping[str, object]],
    formats: Mapping[str, str] | None = None,
    *,
    num_text_columns: int = 1,
) -> None:
    """Print a line for each row below the names of the first; figures by their column's format, to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for row in rows:
        for name in row if not table.columns else ():
            justify = "left" if len(table.columns) < num_text_columns else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        table.add_row(*(format(cell, (formats or {}).get(name, "")) for name, cell in row.items()))
    # As wide as it needs, also where the output goes into a file.
    Console(width=400, highlight=False, markup=False, emoji=False).print(table)
