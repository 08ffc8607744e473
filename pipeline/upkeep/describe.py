"""Describe in words a store (`alignkd info`), a plan (`alignkd plan`) and a check (`alignkd check`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from textwrap import indent
from typing import TYPE_CHECKING, Any

from cache import Summary
from pipeline.errors import ConfigError
from pipeline.readable import readable_bytes, readable_seconds
from pipeline.teacher_cache.blindness import FIELD, Blindness
from pipeline.text_table import text_table

if TYPE_CHECKING:  # they import torch, which a look at a store does not need
    from pipeline.upkeep.agreement import Agreement
    from pipeline.upkeep.check import Check
    from pipeline.upkeep.information import Information
    from pipeline.upkeep.plan import StorePlan

UNITS = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def reasons_by_kind(reasons: Mapping[str, int]) -> dict[str, int]:
    """Count rejects by the text before the first colon; the text after it is of one sample."""
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[reason.partition(": ")[0]] += count
    return dict(kinds.most_common())


def parse_bytes(text: str) -> float:
    """Return 500GB, 1.5 TiB or 1000000 in bytes. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in UNITS:
        raise ConfigError(f"{text!r}: expected a size such as 500GB or 1.5TiB")
    return float(found[1]) * UNITS[found[2]]


def vision_tokens(teacher: Mapping[str, Any]) -> str:
    """Return how many vision tokens an image has, from the facts of a store's teacher."""
    count = teacher.get("num_vision_tokens")
    return f"{count} vision tokens" if count else "vision tokens by the size of an image"


def teacher_size(teacher: Mapping[str, Any]) -> str:
    """Return the size of a store's teacher, as far as the manifest has it: not every store is of stage 1."""
    named = (("num_layers", "{} layers"), ("num_heads", "{} heads"), ("hidden_size", "width {}"))
    known = [words.format(teacher[name]) for name, words in named if name in teacher]
    if len(known) == len(named):
        known.append(vision_tokens(teacher))
    return ", ".join(known) or "of unknown size"


def _tensors_used(teacher: Mapping[str, Any]) -> str:
    if "num_tensors_used" not in teacher:
        return ""
    model = "stub" if teacher.get("is_stub") else "whole model"
    return f"; {model}, {teacher['num_tensors_used']} tensors used"


def describe_store(store: Summary) -> str:
    """Return what a store's records say: teacher, samples, targets, rejects, provenance, fingerprint."""
    teacher, made, rejects = store.teacher, store.provenance, reasons_by_kind(store.rejects_by_reason)
    lines = [
        store.path,
        f"  teacher     {teacher.get('name', '?')}: {teacher_size(teacher)}{_tensors_used(teacher)}",
        f"  parts       {store.parts_done} of {store.parts_planned}",
        f"  samples     {store.samples:,} cached, {store.rejected:,} rejected",
        f"  images      {store.distinct_images:,} stored for {store.image_references:,} uses "
        f"(dedupe factor {store.dedupe_factor:.2f})",
        f"  bytes       {readable_bytes(store.bytes)} in all, {readable_bytes(store.bytes_per_sample)} a sample",
        f"  time        {_time(store)} of stage 1",
        f"  image use   {_use_of_images(made)}",
        "",
        indent(_target_table(store), "  "),
        "",
        *(f"  {count:,} rejected: {reason}" for reason, count in rejects.items()),
        f"  made        {made.get('created', '?')} by `{made.get('command', '?')}`",
        f"  content     {store.content}",
        f"  commit      {made.get('git_commit') or 'not in a checkout'}",
        f"  versions    {', '.join(f'{n} {v}' for n, v in made.get('versions', {}).items())}",
        *(f"  {name.replace('_', ' '):<19} {digest[:16]}" for name, digest in store.fingerprint.items()),
    ]
    return "\n".join(lines)


def describe_info(found: Information) -> str:
    """Return the page that `alignkd info` prints: the store's, and how often its teacher agrees with the labels."""
    lines = [describe_store(found.summary)]
    if found.agreement is not None:
        lines += ["", indent(_agreement(found.agreement), "  ")]
    if found.absent:
        lines += ["", f"  whether the teacher agrees with the labels cannot be read: {found.absent}"]
    return "\n".join(lines)


def _agreement(found: Agreement) -> str:
    return "\n".join(filter(None, [str(found), found.warning]))


def describe_plan(plan: StorePlan) -> str:
    """Return the page that `alignkd plan` prints."""
    if not plan.is_known:
        what = f"all {plan.probed_samples:,} probed samples were rejected: nothing can be said of bytes and hours"
        return f"{plan.path}: {plan.num_shards:,} shards; {what}\n\n{_probed_rejects(plan)}"
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
        _probed_rejects(plan),
        text_table([["target", "source", "bytes a sample", "in all"], *rows]),
        "\n".join(advice),
        "\n".join(errors),
        f"stage 1: {readable_seconds(plan.seconds, digits=2)} on this machine, at the probe's speed",
        "" if plan.agreement is None else f"probe: {_agreement(plan.agreement)}",
        f"disk: {readable_bytes(plan.free_bytes)} free{'' if plan.fits else too_large}",
    ]
    if plan.settings:
        blocks.append("chosen to fit: " + " ".join(f"{key}={value}" for key, value in plan.settings.items()))
    return "\n\n".join(block for block in blocks if block)


def _probed_rejects(plan: StorePlan) -> str:
    """Return why probed samples were rejected, each kind of reason with its first sample's."""
    lines: list[str] = []
    for kind, count in reasons_by_kind(plan.probed_rejects).items():
        example = next(reason for reason in plan.probed_rejects if reason.partition(": ")[0] == kind)
        lines.append(f"{count:,} of {plan.probed_samples:,} probed samples rejected, such as: {example}")
    return "\n".join(lines)


def describe_check(found: Check) -> str:
    """Return the page that `alignkd check` prints."""
    stub = "a stub of " if found.is_stub else ""
    blocks = [f"{found.samples} samples captured again with {stub}{found.teacher} in {found.dtype}"]
    rows = [["array", "values", "max error", "mean error", "agreement", "of its limit, %"]]
    for array in found.arrays:
        errors = [f"{array.max_error:.2e}", f"{array.mean_error:.2e}", f"{array.agreement:.6f}"]
        rows.append([array.name, f"{array.values:,}", *errors, f"{100 * array.of_limit:.0f}"])
    blocks.append(text_table(rows))
    if found.logits:
        blocks.append(
            f"answers: {found.logits.positions:,} positions, the same likeliest token at "
            f"{100 * found.logits.top1_agreement:.2f}%, KL(live || stored) {found.logits.kl:.2e} nats"
        )
    if found.losses:
        rows = [["loss of the student", "stored", "live", "gradients' cosine"]]
        for loss in found.losses:
            rows.append([loss.name, f"{loss.stored:.6g}", f"{loss.live:.6g}", f"{loss.gradient_cosine:.6f}"])
        blocks.append(text_table(rows))
    else:
        blocks.append(f"losses: {found.losses_absent or 'the config has none that reads the store'}")
    blocks.append(f"use of the images: {found.blindness}")
    beyond = ", ".join(array.name for array in found.arrays if array.of_limit > 1)
    blocks.append(f"NOT what the teacher says: {beyond}" if beyond else "every value within its stated error")
    return "\n\n".join(blocks)


def _time(store: Summary) -> str:
    return "not recorded" if store.teacher_seconds is None else readable_seconds(store.teacher_seconds)


def _use_of_images(provenance: Mapping[str, Any]) -> str:
    known = provenance.get(FIELD)
    if not isinstance(known, dict) or "pairs" not in known:  # anybody may write a store
        return "not measured; `alignkd check` does it"
    return str(Blindness.from_json(known))


def _target_table(store: Summary) -> str:
    rows = [["array", "rows", "axes", "codec", "bytes", "a sample", "stated error"]]
    for array in store.arrays:
        row = ["*" if size is None else str(size) for size in array.row_shape]
        shape = f"{array.axes} = {'x'.join(['*', *row])}"
        sizes = [readable_bytes(array.bytes), readable_bytes(array.bytes_per_sample)]
        rows.append([array.name, f"{array.rows:,}", shape, array.codec, *sizes, array.stated_error])
    return text_table(rows, num_heads=0, justify="left")
