"""Describe a store in words: what `alignkd info` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from textwrap import indent

from cache import Summary
from pipeline.text_table import text_table


def readable_bytes(count: float) -> str:
    """Return a size in decimal units, with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def reasons_by_kind(reasons: Mapping[str, int]) -> dict[str, int]:
    """Count rejects by the text before the first colon; the text after it is of one sample."""
    kinds: Counter[str] = Counter()
    for reason, count in reasons.items():
        kinds[reason.partition(": ")[0]] += count
    return dict(kinds.most_common())


def describe_store(store: Summary) -> str:
    """Return a page: teacher, samples, targets, rejects, provenance, fingerprint."""
    teacher, made, rejects = store.teacher, store.provenance, reasons_by_kind(store.rejects_by_reason)
    lines = [
        store.path,
        f"  teacher     {teacher['name']}: {teacher['num_layers']} layers, {teacher['num_heads']} heads, "
        f"width {teacher['hidden_size']}, {teacher['num_vision_tokens']} vision tokens; "
        f"{'stub' if teacher['is_stub'] else 'whole model'}, {teacher['num_tensors_used']} tensors used",
        f"  parts       {store.parts_done} of {store.parts_planned}",
        f"  samples     {store.samples:,} cached, {store.rejected:,} rejected",
        f"  images      {store.distinct_images:,} stored for {store.image_references:,} uses "
        f"(dedupe factor {store.dedupe_factor:.2f})",
        f"  bytes       {readable_bytes(store.bytes)} in all, {readable_bytes(store.bytes_per_sample)} a sample",
        f"  time        {_duration(store.teacher_seconds)} of stage 1",
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


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"


def _target_table(store: Summary) -> str:
    rows = [["array", "rows", "axes", "codec", "bytes", "a sample", "stated error"]]
    for array in store.arrays:
        shape = f"{array.axes} = {'x'.join(['*', *map(str, array.row_shape)])}"
        sizes = [readable_bytes(array.bytes), readable_bytes(array.bytes_per_sample)]
        rows.append([array.name, f"{array.rows:,}", shape, array.codec, *sizes, array.stated_error])
    return text_table(rows, num_heads=0, justify="left")
