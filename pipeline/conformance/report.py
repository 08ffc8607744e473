"""`alignkd models check`: everything that the suite says of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from pipeline.conformance.checks import CHECKS, Check
from pipeline.conformance.names import wrong_names
from pipeline.conformance.specimen import Specimen, specimen_of
from pipeline.conformance.weights import without_projector, wrong_weights
from pipeline.errors import is_ours, reason_of
from pipeline.models.configuration import read_config
from pipeline.models.families import FAMILIES
from pipeline.models.files.checkpoint import Checkpoint, checkpoint_folder


@dataclass(frozen=True)
class Line:
    """A line of the report, and whether what it says is good."""

    text: str
    passed: bool = True


def check_model(name: str) -> Iterator[Line]:
    """Yield what is found of a checkpoint, a folder or hub id, line by line. Raises what loading it would raise."""
    folder = checkpoint_folder(name)
    config = read_config(folder, let_in_only=False)
    is_in = config.model_type in FAMILIES
    yield Line(f"family {config.model_type}, {'let in' if is_in else 'not let in'}; transformers "
               f"{transformers.__version__}")  # fmt: skip
    passed = True
    for line in _run(folder, config):
        passed &= line.passed
        yield line
    if not is_in and passed:
        yield Line(
            f"to let it in, add {config.model_type!r} to FAMILIES in pipeline/models/families.py, and a tiny "
            "checkpoint of it to tests/tiny_families.py"
        )


def _run(folder: Path, config: Any) -> Iterator[Line]:
    """Yield what the checks find. A family that does things in another way may raise anything in them."""
    try:
        wrong = wrong_names(Checkpoint(str(folder)), config)
        yield Line(
            "; ".join(wrong) or "the checkpoint has every tensor of the model, and no other", not wrong
        )
        if wrong:
            return
        specimen = specimen_of(folder)
        yield Line(_description(specimen))
        if found := wrong_weights(specimen.vlm.network) or without_projector(specimen.vlm):
            yield Line(found, passed=False)
            return
        yield from (_line(check(specimen)) for check in CHECKS)
    except Exception as error:
        if is_ours(error):
            raise
        yield Line(
            f"it cannot be run: {type(error).__name__}: {reason_of(error)}; see what the rows of FAMILIES in "
            "pipeline/models/families.py say of families that differ, such as how the tensors of images are joined",
            passed=False,
        )


def _description(specimen: Specimen) -> str:
    sizes = sorted({size for sample in specimen.samples for size in sample.sizes})
    refused = f"; the template refuses {' and '.join(specimen.refused)}" if specimen.refused else ""
    return (
        f"{len(specimen.samples)} made-up samples through its first {specimen.num_attentions} layers with attention; "
        f"images of {', '.join(map(str, sizes))} vision tokens{refused}"
    )


def _line(check: Check) -> Line:
    return Line(f"{check.name} ({check.found:.1e}, at most {check.allowed:.0e})", check.passed)
