"""`alignkd bench-model`: one model in every runtime, on the same questions, in alternating turns."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.config import Config, EvaluateConfig
from pipeline.data.decoding import decode_image
from pipeline.data.load_preparation import load_preparation
from pipeline.errors import ConfigError
from pipeline.evaluation.compare import Answered, paired_gain
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.questions import Question, read_questions
from pipeline.export.executorch.packages import hidden
from pipeline.export.gguf.geometry import check_is_mobilevlm
from pipeline.export.pictures import padding_of, square_of
from pipeline.export.served import Served
from pipeline.export.source import Source
from pipeline.phone.answers import Shown, question_text
from pipeline.phone.contestants import Bench, Contestant
from pipeline.phone.energy import EnergyMeter
from pipeline.phone.result import BenchResult, Row
from pipeline.phone.runners import Asked, Timed
from pipeline.progress import Progress
from pipeline.ratios import Ratios


def bench_model(
    source: Source,
    config: Config,
    folder: Path,
    *,
    quants: Sequence[str],
    num_questions: int,
    turns: int,
    new_tokens: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[BenchResult, list[Shown]]:
    """Measure a checkpoint in PyTorch, llama.cpp at each quantisation, and ExecuTorch; return all answers, too.

    Exports are kept in `folder` and used again. Raises `ConfigError` for a family that llama.cpp's files are not
    written for, or a test set whose questions have several images.
    """
    check_is_mobilevlm(source.config, source.folder)
    settings = config.evaluate
    if settings is None:
        raise ConfigError("evaluate: bench-model asks the held-out questions; name evaluate.shards")
    preparation = load_preparation(str(source.folder), config.data)
    questions = _chosen(list(read_questions(settings, preparation, config.data)), num_questions)
    padding = padding_of(source)
    asked = [_asked(question, preparation, padding) for question in questions]
    longest = max(len(one.ids) for one in asked) + max(new_tokens, settings.max_new_tokens) + 8
    bench = Bench(source, folder, threads, longest, tuple(preparation.stop_ids), say)
    contestants = list(bench.contestants(quants))
    with ExitStack() as stack:
        with hidden():
            served = [stack.enter_context(Served(c.build, *c.arguments, what=c.name)) for c in contestants]
        timed, joules = _turns(served, asked[:turns], new_tokens)
        predictions = [
            _predictions(one, contestant.name, questions, asked, preparation.tokenizer, settings)
            for one, contestant in zip(served, contestants, strict=True)
        ]
        memory = [one.model_bytes() for one in served]
    rows = [
        _row(contestant, bytes_, mine, energy, answers, timed[0], predictions[0])
        for contestant, bytes_, mine, energy, answers in zip(
            contestants, memory, timed, joules, predictions, strict=True
        )
    ]
    machine = f"{platform.processor() or platform.machine()}, {platform.system()}"
    turns = min(turns, len(asked))
    result = BenchResult(rows, source.name, source.digest, len(asked), turns, new_tokens, threads, machine)
    return result, _shown(contestants, asked, predictions, preparation.tokenizer)


def _chosen(questions: list[Question], number: int) -> list[Question]:
    """Return `number` of the questions, evenly spread over the test set."""
    if number >= len(questions):
        return questions
    return [questions[round(n * (len(questions) - 1) / (number - 1 or 1))] for n in range(number)]


def _asked(question: Question, preparation: Any, padding: tuple[int, ...] | None) -> Asked:
    ids = tuple(int(number) for number in question.prompt)
    if len(question.image_spans) > 1:
        raise ConfigError(
            f"{question.shard}: {question.unanswered.key!r} has {len(question.image_spans)} images; bench-model "
            "takes questions with one image at most"
        )
    if not question.image_spans:
        return Asked(ids)
    data = question.read_image(0)
    pixels = preparation.preprocess(data)["pixel_values"][0].numpy()
    return Asked(ids, pixels, np.asarray(square_of(decode_image(data), padding)))


def _turns(
    served: Sequence[Served], asked: Sequence[Asked], new_tokens: int
) -> tuple[list[list[Timed]], list[list[float | None]]]:
    """Let each answer each question, each turn beginning with another one; one answer before warms up."""
    timed: list[list[Timed]] = [[] for _ in served]
    joules: list[list[float | None]] = [[] for _ in served]
    for one in served:
        one.call("run", asked[0], max_new_tokens=new_tokens, ignore_end=True)
    meter = EnergyMeter()
    for turn, question in enumerate(asked):
        for step in range(len(served)):
            number = (turn + step) % len(served)
            meter.joules()
            timed[number].append(
                served[number].call("run", question, max_new_tokens=new_tokens, ignore_end=True)
            )
            joules[number].append(meter.joules())
    return timed, joules


def _predictions(
    served: Served,
    name: str,
    questions: Sequence[Question],
    asked: Sequence[Asked],
    tokenizer: Any,
    settings: EvaluateConfig,
) -> list[Prediction]:
    """Answer every question as `alignkd evaluate` does: greedily, up to the end of the answer."""
    made: list[Prediction] = []
    with Progress(name, unit="questions", doing="answering") as progress:
        for number, (question, one) in enumerate(zip(questions, asked, strict=True)):
            progress(number, len(questions))
            answer = served.call("run", one, max_new_tokens=settings.max_new_tokens, ignore_end=False)
            text = tokenizer.decode(answer.answer_ids, skip_special_tokens=True)
            made.append(replace(question.unanswered, prediction=text))
        progress(len(questions), len(questions))
    return made


def _row(
    contestant: Contestant,
    memory: int,
    timed: list[Timed],
    joules: list[float | None],
    answers: list[Prediction],
    base: list[Timed],
    base_answers: list[Prediction],
) -> Row:
    is_base = timed is base
    gain = None if is_base else paired_gain([Answered.of(answers)], [Answered.of(base_answers)])
    energy = [one for one in joules if one is not None]
    return Row(
        name=contestant.name,
        eyes=contestant.eyes,
        bytes=contestant.bytes,
        memory=memory,
        image=statistics.median([one.image for one in timed if one.image] or [0.0]),
        first_token=statistics.median(one.first_token for one in timed),
        tokens_a_second=statistics.median(one.tokens_a_second for one in timed),
        first_token_ratio=None if is_base else _ratio("first_token", timed, base),
        tokens_ratio=None if is_base else _ratio("tokens_a_second", timed, base),
        joules=statistics.median(energy) if energy else None,
        accuracy=statistics.fmean(one.correct for one in answers),
        same_answers=statistics.fmean(
            one.prediction == other.prediction for one, other in zip(answers, base_answers, strict=True)
        ),
        difference=None if gain is None else (gain.difference, gain.low, gain.high),
    )


def _shown(
    contestants: Sequence[Contestant],
    asked: Sequence[Asked],
    predictions: Sequence[Sequence[Prediction]],
    tokenizer: Any,
) -> list[Shown]:
    """Return each question with its image and all answers, for people."""
    names = [contestant.name for contestant in contestants]
    return [
        Shown(
            question_text(tokenizer.decode([n for n in one.ids if n >= 0], skip_special_tokens=True)),
            one.square,
            answers[0].answer,
            {name: answer.prediction for name, answer in zip(names, answers, strict=True)},
        )
        for one, answers in zip(asked, zip(*predictions, strict=True), strict=True)
    ]


def _ratio(name: str, ours: list[Timed], theirs: list[Timed]) -> Ratios:
    return Ratios.of([getattr(one, name) for one in ours], [getattr(one, name) for one in theirs])
