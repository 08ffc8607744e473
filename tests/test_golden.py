"""The demo's first steps: the same losses to the last bit as when they were committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_losses import NUM_STEPS, measure

pytestmark = pytest.mark.slow

GOLDEN = json.loads((Path(__file__).parent / "golden" / "demo_first_steps.json").read_text())


@pytest.fixture(scope="module")
def measured():
    return measure()


def test_the_demos_first_steps_are_those_committed_bit_for_bit(measured):
    if measured["versions"] != GOLDEN["versions"]:
        pytest.skip(f"bits are those of {GOLDEN['versions']}; here: {measured['versions']}")
    assert measured["steps"] == GOLDEN["steps"], "if meant: python tests/golden_losses.py > tests/golden/..."


def test_the_demos_first_steps_are_those_committed_to_a_tenth_of_a_percent(measured):
    """With any versions: others may sum in another order."""
    mine, golden = measured["steps"], GOLDEN["steps"]
    assert len(mine) == len(golden) == NUM_STEPS
    for step, expected in zip(mine, golden, strict=True):
        assert {name: float.fromhex(value) for name, value in step.items()} == pytest.approx(
            {name: float.fromhex(value) for name, value in expected.items()}, rel=1e-3
        )


def test_the_committed_steps_learn():
    """They are no constants: the labels are closer after six steps than before."""
    first, last = (float.fromhex(GOLDEN["steps"][n]["loss/supervised"]) for n in (0, -1))
    assert last < first
