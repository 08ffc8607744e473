"""The fault harness, a few trials of each kind: `python bench/faults.py` is the long run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parent.parent / "bench" / "faults.py"


@pytest.mark.skipif(shutil.which("cc") is None, reason="the failing disk is compiled with cc")
def test_whatever_goes_wrong_a_rerun_ends_with_the_undisturbed_store(tmp_path):
    figures = tmp_path / "figures.json"
    process = subprocess.run(
        [sys.executable, str(HARNESS), "--trials", "16", "--json", str(figures)],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads(figures.read_text())
    assert [result["trials"] for result in results] == [2] * 8
    assert sum(result["met"] for result in results) >= 10  # most faults did come in the way
    assert not any(result["wrong"] for result in results)
