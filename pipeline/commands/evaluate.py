"""alignkd evaluate: a checkpoint's scores on held-out conversations, or on a suite of public benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import AsJson, Overrides, load, say

if TYPE_CHECKING:
    from pipeline.benchmarks.answering import HowToAsk
    from pipeline.config.config import Config

BENCHMARK_OUTPUT = Path("runs/benchmarks")


def evaluate(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML config, such as configs/demo.yaml; optional with --suite."),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint folder or hub id; default: the config's teacher. With --suite also two, to compare."
        ),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="Public benchmarks to ask: align-kd.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="With --suite: folder with a folder for each benchmark (gqa/, pope/, ...)."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="With --suite: some benchmarks, such as gqa,pope.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --suite: ask a sample of N questions of each benchmark.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the predictions, JSON lines; with --suite a folder for the answers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on held-out conversations or on public benchmarks.

    On the config's conversations: accuracy of exact matches by question type, and log probability of the references.
    Where references are sentences, token F1 and ROUGE-L are shown, too; `evaluate.metrics` chooses.

    With --suite align-kd on the benchmarks of the paper: GQA, ScienceQA-IMG, TextVQA, POPE, MME and MMBench, with the
    original's prompts. docs/benchmarks.md says how to get them. A rerun asks only questions without an answer.
    """
    if suite is not None:
        if data is None:
            raise typer.BadParameter("--suite needs --data, the folder with the benchmarks' files")
        settings = load(config, overrides) if config else None
        _evaluate_suite(settings, model, suite, data, only, limit, output, as_json)
        return
    if given := [
        name for name, value in (("data", data), ("only", only), ("limit", limit)) if value is not None
    ]:
        raise typer.BadParameter(f"--{given[0]} belongs to --suite; give --suite align-kd")
    if config is None:
        raise typer.BadParameter("Missing option '--config'; or give --suite and --data")
    if len(model or []) > 1:
        raise typer.BadParameter(
            "several --model belong to --suite; evaluate held-out conversations one by one"
        )
    _evaluate_conversations(load(config, overrides), model[0] if model else None, output, as_json)


def _evaluate_suite(
    settings: Config | None,
    models: Sequence[str] | None,
    suite: str,
    data: Path,
    only: str | None,
    limit: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from pipeline.benchmarks.run import chosen_benchmarks, measure, read_suite
    from pipeline.benchmarks.table import suite_json, suite_text

    names = list(models or ([settings.teacher.model] if settings else []))
    if len(names) not in (1, 2) or len(set(names)) < len(names):
        raise typer.BadParameter("--suite needs one --model, or two different ones to compare")
    chosen = chosen_benchmarks(suite, [name.strip() for name in only.split(",")] if only else [])
    asked = read_suite(data, chosen, limit=limit, must_all=only is not None, say=say)
    folder = output or (Path(settings.output_dir) / "benchmarks" if settings else BENCHMARK_OUTPUT)
    try:
        scores = [measure(name, asked, _how_to_ask(settings), output=folder) for name in names]
    except KeyboardInterrupt:
        say(f"alignkd: interrupted; the answers so far are in {folder}; run the same command again to resume")
        raise typer.Exit(130) from None
    print(json.dumps(suite_json(scores)) if as_json else suite_text(scores))


def _how_to_ask(settings: Config | None) -> HowToAsk:
    from pipeline.benchmarks.answering import HowToAsk

    return HowToAsk(settings.data, settings.evaluate) if settings else HowToAsk()


def _evaluate_conversations(settings: Config, model: str | None, output: Path | None, as_json: bool) -> None:
    from pipeline.evaluation.answer_scores import metrics_for, score_table, scores_by_type
    from pipeline.evaluation.compare import accuracy_table
    from pipeline.evaluation.predictions import accuracy_by_type, by_test_set
    from pipeline.evaluation.scores import evaluate_checkpoint

    sets = by_test_set(evaluate_checkpoint(settings, model or settings.teacher.model, output=output))
    assert settings.evaluate is not None  # else there would be no predictions
    metrics = {
        test_set: metrics_for(settings.evaluate, predictions) for test_set, predictions in sets.items()
    }
    if as_json:
        print(json.dumps({
            test_set: {
                name: {"accuracy": accuracy[name][0], "questions": scores.questions, **scores.to_json()}
                for name, scores in scores_by_type(predictions, metrics[test_set]).items()
            }
            for test_set, predictions in sets.items()
            for accuracy in [accuracy_by_type(predictions)]
        }))  # fmt: skip
        return
    for test_set, predictions in sets.items():
        print(f"test set {test_set}\n" if len(sets) > 1 else "", end="")
        of_model = {model or "teacher": predictions}
        if "exact_match" in metrics[test_set]:
            print(accuracy_table(of_model), end="\n\n")
        print(score_table(of_model, metrics[test_set]))
