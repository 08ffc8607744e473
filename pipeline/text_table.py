"""Tables as aligned text, for the terminal and the docs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

HEAD_RULE = Box("    \n    \n----\n" + 5 * "    \n")  # a line below the heads, and no other


def text_table(
    rows: Sequence[Sequence[str]], *, num_heads: int = 1, justify: Literal["left", "right"] = "right"
) -> str:
    """Return rows as aligned text, with a line below the first `num_heads`; the first column is to the left."""
    table = Table(
        box=HEAD_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=num_heads > 0
    )
    for number, column in enumerate(zip(*rows, strict=True)):
        heads = Text("\n".join(column[:num_heads]))
        table.add_column(heads, justify=justify if number else "left", no_wrap=True)
    for row in rows[num_heads:]:
        table.add_row(*map(Text, row))  # as `Text`, "[+1.2, 3.4]" is no markup
    console = Console(file=io.StringIO(), width=sum(len(cell) + 2 for row in rows for cell in row))
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
