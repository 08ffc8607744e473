"""Stores and shards from a stranger, a few cases: `python bench/hostile.py --cases 10000` is the long run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parent.parent / "bench" / "hostile.py"


def test_whatever_a_stranger_sends_is_answered_or_refused_with_an_error_of_ours():
    process = subprocess.run([sys.executable, str(HARNESS), "--cases", "60"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    documents, tars, _ = process.stdout.splitlines()
    assert documents.startswith("documents: ") and tars.startswith("tars: ")
