"""transformers' Trainer calls the hooks that stage 2 takes over where it did when that was tried, in every process.

Processes add up and gather in some of them: one that a release calls in the first process alone would wait for ever.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence

import pytest
import transformers.trainer
from transformers import Trainer

from pipeline.distill.training.resuming import ResumingTrainer
from pipeline.distill.training.trainer import DistillTrainer

OURS = (ResumingTrainer, DistillTrainer)
TAKEN_OVER = sorted(
    name
    for ours in OURS
    for name, hook in vars(ours).items()
    if inspect.isfunction(hook) and name != "__init__" and hasattr(Trainer, name)
)

# Hook -> who calls it, and under which conditions. After a change: look whether all processes still meet the call.
CALLS = {
    "_load_from_checkpoint": [
        "_prepare_for_training if resume_from_checkpoint is not None "
        "and not self.is_deepspeed_enabled and (is_sagemaker_mp_enabled() or self.is_fsdp_enabled)",
        "train if resume_from_checkpoint is not None "
        "and (not is_sagemaker_mp_enabled() and (not self.is_deepspeed_enabled) and (not self.is_fsdp_enabled))",
    ],
    "_load_optimizer_and_scheduler": ["_prepare_for_training if resume_from_checkpoint is not None"],
    "_save_optimizer_and_scheduler": ["_save_checkpoint if not self.args.save_only_model"],
    "compute_loss": [
        "prediction_step if not is_sagemaker_mp_enabled() and (has_labels or loss_without_labels)",
        "training_step if not is_sagemaker_mp_enabled()",
    ],
    "create_optimizer": [
        "_prepare_for_training if not self.is_distributed_loading_by_transformers and use_accelerator_prepare "
        "and delay_optimizer_creation",
        "_prepare_for_training if not delay_optimizer_creation",
        "create_optimizer_and_scheduler",
    ],
    "create_scheduler": ["_prepare_for_training", "create_optimizer_and_scheduler"],
    "get_batch_samples": ["_run_epoch"],
    "get_train_dataloader": ["_inner_training_loop"],
    "log": [
        "_finalize_training",
        "_maybe_log_save_evaluate if "
        "self.control.should_log and self.state.global_step > self._globalstep_last_logged",
        "evaluate if not isinstance(eval_dataset, dict)",
    ],
    "save_model": ["_save_checkpoint", "_tune_save_checkpoint", "push_to_hub"],
    # The way from the loop to them
    "_inner_training_loop": [],
    "_run_epoch": ["_inner_training_loop"],
    "_prepare_for_training": ["_inner_training_loop"],
    "_finalize_training": ["_inner_training_loop"],
    "_maybe_log_save_evaluate": ["_run_epoch", "_run_epoch if do_sync_step"],
    "_save_checkpoint": ["_maybe_log_save_evaluate if self.control.should_save"],
}


def test_every_hook_that_is_taken_over_is_in_the_table():
    assert set(TAKEN_OVER) <= CALLS.keys()


@pytest.mark.parametrize("hook", CALLS)
def test_the_trainer_calls_it_where_it_did(hook):
    found = sorted(
        call for name, call in calls_in(ast.parse(inspect.getsource(transformers.trainer))) if name == hook
    )
    assert found == sorted(CALLS[hook]), f"transformers {transformers.__version__} calls {hook} elsewhere"


@pytest.mark.parametrize("hook", TAKEN_OVER)
def test_what_takes_it_over_takes_its_arguments(hook):
    theirs = inspect.signature(getattr(Trainer, hook)).parameters
    mine = inspect.signature(getattr(DistillTrainer, hook)).parameters
    takes_all = {parameter.kind for parameter in mine.values()} & {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    assert takes_all or list(mine)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("self.log(1)", "f"),
        ("if self.args.should_save:\n  self.log(1)\n else:\n  pass", "f if self.args.should_save"),
        ("if self.args.should_save:\n  pass\n else:\n  self.log(1)", "f if not self.args.should_save"),
        ("if not self.args.should_save:\n  return\n self.log(1)", "f if not not self.args.should_save"),
        ("with a:\n  for b in c:\n   x = self.log(1)", "f"),
    ],
)
def test_conditions_are_seen(body, expected):
    assert list(calls_in(ast.parse(f"def f(self):\n {body}"))) == [("log", expected)]


def calls_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(hook, 'function if conditions') of each call `self.hook(...)`; what comes after a return has its condition."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for hook, conditions in _in_block(function.body, []):
            when = " and ".join(conditions)
            yield hook, f"{function.name} if {when}" if conditions else function.name


def _in_block(block: Sequence[ast.stmt], conditions: list[str]) -> Iterator[tuple[str, list[str]]]:
    for statement in block:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue  # a function has its own turn
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        handlers = [handler.body for handler in getattr(statement, "handlers", [])]
        if not isinstance(statement, ast.If):
            yield from _in_expressions(statement, conditions)
            for inner in (*blocks, *handlers):
                yield from _in_block(inner, conditions)
            continue
        yield from _in_expressions(statement, conditions)
        test = ast.unparse(statement.test)
        test = f"({test})" if isinstance(statement.test, ast.BoolOp) and len(conditions) > 0 else test
        yield from _in_block(statement.body, [*conditions, test])
        yield from _in_block(statement.orelse, [*conditions, f"not {test}"])
        if isinstance(statement.body[-1], ast.Return):
            conditions = [*conditions, f"not {test}"]


def _in_expressions(statement: ast.stmt, conditions: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Of the statement itself, not of those in it."""
    fields = [
        value
        for name, value in ast.iter_fields(statement)
        if name not in ("body", "orelse", "finalbody", "handlers")
    ]
    nodes = [
        node
        for value in fields
        for node in (value if isinstance(value, list) else [value])
        if isinstance(node, ast.AST)
    ]
    for call in (inner for node in nodes for inner in ast.walk(node) if isinstance(inner, ast.Call)):
        target = call.func
        if (
            isinstance(target, ast.Attribute)
            and isinstance(target.value, ast.Name)
            and target.value.id == "self"
            and target.attr in CALLS
        ):
            yield target.attr, conditions
