"""docs/twig.md: its lines of Python run, on a small base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from twig_models import twig_specimen

from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.folder import save_twig
from pipeline.twig.geometry import Geometry

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "twig.md"


def test_the_lines_of_python_run(tmp_path, monkeypatch):
    specimen = twig_specimen("llava", tmp_path / "base", num_layers=10)
    geometry = Geometry(1, 2, 8, 10)  # one layer of ten is less than a ninth
    base = BaseIdentity.of_checkpoint(str(specimen.folder))
    save_twig(tmp_path / "runs/scenes/redundant/twig", specimen.twig(geometry).state_dict(), geometry, base)
    monkeypatch.chdir(tmp_path)
    inputs = {name: value for name, value in specimen.prompts([0]).inputs.items()}
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"model": specimen.base.network, "inputs": inputs}
    exec(block.replace("max_new_tokens=200", "max_new_tokens=5"), names)
    assert names["ids"].shape[0] == 1  # pyright: ignore[reportAttributeAccessIssue]
