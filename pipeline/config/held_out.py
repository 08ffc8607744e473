"""The arguments of `train` about held-out losses: when they are computed, and what they decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Change no weight, unless the held-out losses decide something about them: see `decides_weights`.
OF_HELD_OUT = ("eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "metric_for_best_model")

# With the above, they say at which steps the best weights were looked for.
OF_CHECKPOINTS = ("save_steps", "save_strategy")


def is_evaluated(train: Mapping[str, Any]) -> bool:
    """Whether a training computes held-out losses."""
    return train.get("eval_strategy") not in (None, "no") or bool(train.get("eval_on_start"))


def decides_weights(train: Mapping[str, Any]) -> bool:
    """Whether held-out losses choose the student's weights, or the learning rate of later steps."""
    is_plateau = train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    return bool(train.get("load_best_model_at_end")) or is_plateau


def check_held_out(train: Mapping[str, Any], losses: Sequence[str], *, has_shards: bool) -> None:
    """Raise `ValueError` if held-out losses are asked for without samples, or a metric that is none of the losses."""
    if is_evaluated(train) and not has_shards:
        raise ValueError(
            "train.eval_strategy needs held-out samples, but data.held_out_shards is not set; name shards there, "
            "and run stage 1 if the store does not hold them"
        )
    metric = train.get("metric_for_best_model")
    known = ["loss", *losses]
    if metric is not None and str(metric).removeprefix("eval_") not in known:
        raise ValueError(
            f"train.metric_for_best_model: the held-out losses are {', '.join(known)}, found {metric!r}; name one "
            "of them"
        )
