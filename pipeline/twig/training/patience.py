"""Stopping a training whose held-out loss has not become better for a while."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Patience(TrainerCallback):
    """Stops after `most` evaluations in a row that were no better than the best one.

    It counts in the log, which a checkpoint holds: transformers' own callback counts from 0 after a resume.
    """

    def __init__(self, most: int):
        self.most = most

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        found = [entry[name] for entry in state.log_history if name in entry]
        best = (max if args.greater_is_better else min)(found)
        if len(found) - 1 - found.index(best) >= self.most:
            control.should_training_stop = True
