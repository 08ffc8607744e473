"""Published rows of the paper's table, to stand beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

ALIGN_KD = "Align-KD (CVPR 2025), the authors' radar figure"
MOBILEVLM = "MobileVLM V2 (arXiv 2402.03766)"


@dataclass(frozen=True)
class PaperRow:
    """Scores of one published model, by benchmark; `average` is the mean of the six, with MME / 20."""

    name: str
    source: str
    scores: dict[str, float]
    average: float


def _row(name: str, source: str, average: float, *scores: float) -> PaperRow:
    benchmarks = ("gqa", "scienceqa", "textvqa", "pope", "mme", "mmbench")
    return PaperRow(name, source, dict(zip(benchmarks, scores, strict=True)), average)


PAPER = (
    _row("1.7B, Long, baseline", ALIGN_KD, 63.7, 59.0, 64.5, 52.2, 86.1, 1289.2, 55.9),
    _row("1.7B, Long, Align-KD", ALIGN_KD, 65.1, 60.1, 67.7, 53.1, 87.0, 1303.8, 57.5),
    _row("1.7B, Short, baseline", ALIGN_KD, 62.4, 55.1, 63.2, 51.2, 85.3, 1246.3, 57.6),
    _row("1.7B, Short, Align-KD", ALIGN_KD, 64.4, 58.9, 66.6, 52.4, 86.5, 1288.4, 57.8),
    _row("MobileVLM V2 1.7B", MOBILEVLM, 64.2, 59.3, 66.7, 52.1, 84.3, 1302.8, 57.7),
    _row("MobileVLM V2 7B, teacher", MOBILEVLM, 72.1, 62.6, 74.8, 62.3, 85.3, 1560.7, 69.2),
)
