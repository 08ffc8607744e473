"""Stage 1 under faults, a few trials of each kind: `python tests/faults.py` is the long run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HARNESS = Path(__file__).parent / "faults.py"


@pytest.mark.skipif(shutil.which("cc") is None, reason="the failing disk is compiled with cc")
def test_whatever_goes_wrong_a_rerun_ends_with_the_undisturbed_store():
    process = subprocess.run([sys.executable, HARNESS, "--trials", "16"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    found = re.search(r"16 trials, (\d+) met their fault, 0 wrong$", process.stdout.strip())
    assert found and int(found[1]) >= 10, process.stdout
