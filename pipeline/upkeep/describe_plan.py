"""The result of `alignkd plan` as text, and sizes as people write them."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError
from pipeline.text_table import text_table
from pipeline.upkeep.describe import readable_bytes
from pipeline.upkeep.plan import StorePlan

UNITS = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def describe_plan(plan: StorePlan) -> str:
    """Return the page that the command prints."""
    how = "counted when packed" if plan.num_samples_known else "estimated from the shards' bytes"
    sizes = [(t.name, t.source, t.bytes_per_sample, t.total_bytes) for t in plan.targets]
    sizes.append(("store", "", plan.bytes_per_sample, plan.total_bytes))
    rows = [
        [name, source, readable_bytes(each), readable_bytes(total)] for name, source, each, total in sizes
    ]
    advice = [f"{target.name}: {target.advice}" for target in plan.targets]
    advice.append("(measured here, on the probe: reading by one process, and the stub on stage 1's device)")
    errors = [f"{name}: {error}" for target in plan.targets for name, error in target.stated_errors.items()]
    too_large = f"; the store does NOT fit: it takes {readable_bytes(plan.total_bytes)}"
    blocks = [
        f"{plan.path}: {plan.num_shards:,} shards, {plan.num_samples:,} samples ({how}); "
        f"{plan.probed_samples:,} probed",
        text_table([["target", "source", "bytes a sample", "in all"], *rows]),
        "\n".join(advice),
        "\n".join(errors),
        f"stage 1: {plan.seconds / 3600:.2g} hours on this machine, at the probe's speed",
        f"disk: {readable_bytes(plan.free_bytes)} free{'' if plan.fits else too_large}",
    ]
    if plan.settings:
        blocks.append("chosen to fit: " + " ".join(f"{key}={value}" for key, value in plan.settings.items()))
    return "\n\n".join(block for block in blocks if block)


def parse_bytes(text: str) -> float:
    """Return 500GB, 1.5 TiB or 1000000 in bytes. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in UNITS:
        raise ConfigError(f"{text!r}: expected a size such as 500GB or 1.5TiB")
    return float(found[1]) * UNITS[found[2]]
