"""The result of `alignkd check` as text: a table of arrays, one of losses, and a verdict."""

from __future__ import annotations

from pipeline.text_table import text_table
from pipeline.upkeep.check import Check


def describe_check(found: Check) -> str:
    """Return the page that the command prints."""
    stub = "a stub of " if found.is_stub else ""
    blocks = [f"{found.samples} samples captured again with {stub}{found.teacher} in {found.dtype}"]
    rows = [["array", "values", "max error", "mean error", "cosine", "of its limit, %"]]
    for array in found.arrays:
        errors = [f"{array.max_error:.2e}", f"{array.mean_error:.2e}", f"{array.cosine:.6f}"]
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
    beyond = ", ".join(array.name for array in found.arrays if array.of_limit > 1)
    blocks.append(f"NOT what the teacher says: {beyond}" if beyond else "every value within its stated error")
    return "\n\n".join(blocks)
