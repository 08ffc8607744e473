"""BENCHMARKS: the six benchmarks of the Align-KD paper, and TextVQA without OCR tokens beside them."""

from __future__ import annotations

from pipeline.benchmarks.benchmark import Benchmark
from pipeline.benchmarks.gqa import GQA
from pipeline.benchmarks.mmbench import MMBENCH
from pipeline.benchmarks.mme import MME
from pipeline.benchmarks.pope import POPE
from pipeline.benchmarks.scienceqa import SCIENCEQA
from pipeline.benchmarks.textvqa import TEXTVQA, TEXTVQA_NO_OCR

# In the order of the paper's table.
BENCHMARKS: dict[str, Benchmark] = {
    row.name: row for row in (GQA, SCIENCEQA, TEXTVQA, POPE, MME, MMBENCH, TEXTVQA_NO_OCR)
}
SUITES = {"align-kd": tuple(BENCHMARKS)}
