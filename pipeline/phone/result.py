"""What was measured of each runtime, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config.provenance import replace_text
from pipeline.errors import PipelineError
from pipeline.ratios import Ratios
from pipeline.readable import readable_bytes
from pipeline.text_table import text_table

RESULT = "bench-model.json"
HEADS = ("", "size", "memory", "image, ms", "first token, ms", "tokens/s", "accuracy, %", "beside PyTorch")


@dataclass(frozen=True)
class Row:
    """A runtime's medians; `bytes` of its files, `memory` in bytes that its model took.

    `image` and `first_token` are seconds. `accuracy` is a share of the questions; `difference` is that to PyTorch,
    with a 95% interval, in shares; None for PyTorch itself.
    """

    name: str
    eyes: str
    bytes: int
    memory: int
    image: float
    first_token: float
    tokens_a_second: float
    first_token_ratio: Ratios | None
    tokens_ratio: Ratios | None
    joules: float | None
    accuracy: float
    same_answers: float
    difference: tuple[float, float, float] | None


@dataclass(frozen=True)
class BenchResult:
    """All rows, and what they were measured with."""

    rows: list[Row]
    model: str
    digest: str
    questions: int
    turns: int
    new_tokens: int
    threads: int
    machine: str

    def write(self, folder: Path) -> Path:
        """Write the result as JSON into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / RESULT, json.dumps(asdict(self), indent=1) + "\n")
        return folder / RESULT

    @classmethod
    def read(cls, file: Path) -> BenchResult:
        """Read what `write` wrote. Raises `PipelineError` if the file is damaged."""
        try:
            made: dict[str, Any] = json.loads(file.read_text())
            rows = [_row(row) for row in made.pop("rows")]
            return cls(rows, **made)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PipelineError(f"{file} is damaged; run `alignkd bench-model` again") from error

    def cells(self) -> list[list[str]]:
        """Return a table's cells: name, size, memory, image, first token, tokens a second, accuracy, difference."""
        return [_cells(row) for row in self.rows]

    def __str__(self) -> str:
        table = [list(HEADS), *self.cells()]
        joules = [f"{row.name} {row.joules:.3g}" for row in self.rows if row.joules is not None]
        notes = [
            f"accuracy of {self.questions:,} questions, difference with a paired 95% interval; times are medians of "
            f"{self.turns} turns in which all runtimes answer the same question, {self.new_tokens} tokens, on "
            f"{self.threads} threads of {self.machine}",
            "memory: what a process has at most, less what it had before the model was loaded",
            "joules an answer: " + ", ".join(joules) if joules else "energy: this machine does not say",
        ]  # fmt: skip
        ratios = [["beside PyTorch, same turns", "first token", "tokens/s"]]
        ratios += [
            [r.name, str(r.first_token_ratio), str(r.tokens_ratio)] for r in self.rows if r.first_token_ratio
        ]
        return "\n".join([text_table(table), "", text_table(ratios), "", *notes])


def _cells(row: Row) -> list[str]:
    difference = "-"
    if row.difference is not None:
        middle, low, high = (100 * value for value in row.difference)
        difference = f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
    return [
        row.name if row.eyes == "its own" else f"{row.name}, {row.eyes} eyes",
        readable_bytes(row.bytes),
        readable_bytes(row.memory),
        f"{1000 * row.image:.1f}",
        f"{1000 * row.first_token:.1f}",
        f"{row.tokens_a_second:.0f}",
        f"{100 * row.accuracy:.2f}",
        difference,
    ]


def _row(made: dict[str, Any]) -> Row:
    for name in ("first_token_ratio", "tokens_ratio"):
        made[name] = Ratios(**made[name]) if made[name] else None
    made["difference"] = tuple(made["difference"]) if made["difference"] else None
    return Row(**made)
