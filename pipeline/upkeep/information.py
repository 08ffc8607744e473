"""What `alignkd info` says of a store: its summary, and how often its teacher agrees with the labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import CacheError, Store, Summary, summarise
from pipeline.errors import PipelineError
from pipeline.upkeep.agreement import Agreement, agreement_in


@dataclass(frozen=True)
class Information:
    """A store's summary; the agreement is None without logits, or where they cannot be read, for `absent`."""

    summary: Summary
    agreement: Agreement | None
    absent: str = ""

    def to_json(self) -> dict[str, Any]:
        found = self.agreement.to_json() if self.agreement else None
        return self.summary.to_json() | {"agreement": found, "agreement_absent": self.absent}


def inform(path: str | Path) -> Information:
    """Describe a store. One whose logits are damaged is described without them."""
    summary = summarise(path)
    try:
        return Information(summary, agreement_in(Store(path)))
    except (CacheError, PipelineError, OSError) as error:
        return Information(summary, None, str(error))
