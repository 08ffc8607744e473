"""The suite: questions of every benchmark that is there, asked of every model, answers kept, scores returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from cache import digest_of
from pipeline.benchmarks.answering import Answerer, HowToAsk
from pipeline.benchmarks.answers_file import AnswersFile
from pipeline.benchmarks.benchmark import Answered, Benchmark, BenchmarkQuestion
from pipeline.benchmarks.scores import BenchmarkScore, SuiteScores, score_of
from pipeline.benchmarks.suite import BENCHMARKS, SUITES
from pipeline.data.templates import IMAGE_TOKEN
from pipeline.errors import ConfigError, PipelineError, did_you_mean
from pipeline.progress import Progress


@dataclass(frozen=True)
class Asked:
    """A benchmark, the questions that are asked of it, and how many its files hold."""

    benchmark: Benchmark
    questions: Sequence[BenchmarkQuestion]
    num_all: int


def chosen_benchmarks(suite: str, only: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of a suite, or those of them that are named. Raises `ConfigError` for an unknown name."""
    if suite not in SUITES:
        raise ConfigError(f"--suite: unknown name {suite!r}{did_you_mean(suite, list(SUITES))}")
    for name in only:
        if name not in SUITES[suite]:
            raise ConfigError(f"--only: unknown benchmark {name!r}{did_you_mean(name, list(SUITES[suite]))}")
    return [BENCHMARKS[name] for name in SUITES[suite] if not only or name in only]


def read_suite(
    data: Path,
    benchmarks: Sequence[Benchmark],
    *,
    limit: int | None,
    must_all: bool,
    say: Callable[[str], None],
) -> list[Asked]:
    """Read the questions of the benchmarks whose folder is below `data`; report the others through `say`.

    With `must_all` a missing folder is an error.
    """
    asked: list[Asked] = []
    for benchmark in benchmarks:
        folder = benchmark.folder(data)
        if folder is None:
            absent = f"{benchmark.title}: no folder {data / benchmark.folders[0]}; {benchmark.source}"
            if must_all:
                raise ConfigError(absent)
            say(absent)
            continue
        questions = benchmark.read(folder)
        _check(questions, folder)
        asked.append(Asked(benchmark, sample_of(questions, limit), len(questions)))
    if not asked:
        raise ConfigError(f"--data {data}: holds no benchmark; docs/benchmarks.md says where to get them")
    return asked


def _check(questions: Sequence[BenchmarkQuestion], folder: Path) -> None:
    """Raise `PipelineError` unless there are questions, each with a name of its own and with one image."""
    if not questions:
        raise PipelineError(f"{folder}: its files hold no question; use the published files")
    name, times = Counter(question.id for question in questions).most_common(1)[0]
    if times > 1:
        raise PipelineError(f"{folder}: {times} questions are called {name!r}; use the published files")
    if placed := [question.id for question in questions if IMAGE_TOKEN in question.text]:
        raise PipelineError(
            f"{folder}: the text of question {placed[0]} holds {IMAGE_TOKEN}, the place of an image; use the "
            "published files"
        )


def sample_of(questions: Sequence[BenchmarkQuestion], limit: int | None) -> Sequence[BenchmarkQuestion]:
    """Return at least `limit` questions, in their order: whole units, chosen by digest, from each group in turn."""
    if limit is None or limit >= len(questions):
        return questions
    units: dict[str, list[BenchmarkQuestion]] = {}
    for question in questions:
        units.setdefault(question.unit or question.id, []).append(question)
    groups: dict[str, list[str]] = {}
    for name in sorted(units, key=lambda name: digest_of([name])):
        groups.setdefault(units[name][0].group, []).append(name)
    taken: set[str] = set()
    for name in (name for turn in zip_longest(*groups.values()) for name in turn if name is not None):
        if len(taken) >= limit:
            break
        taken |= {question.id for question in units[name]}
    return [question for question in questions if question.id in taken]


def measure(model: str, suite: Sequence[Asked], how: HowToAsk, *, output: Path) -> SuiteScores:
    """Ask a model all questions that have no answer in `output`, and return its scores."""
    answerer = Answerer(model, how)
    folder = output / model.strip("/").replace("/", "_")
    scores = {one.benchmark.name: _measured(answerer, one, folder) for one in suite}
    return SuiteScores(model, scores)


def _measured(answerer: Answerer, asked: Asked, folder: Path) -> BenchmarkScore:
    benchmark, questions = asked.benchmark, asked.questions
    preparation = answerer.preparation(benchmark)
    identity = answerer.identity(benchmark, preparation)
    with AnswersFile(folder / f"{benchmark.name}.jsonl", identity) as file:
        known = file.known(questions)
        rest = [question for question in questions if question.id not in known]
        with Progress(benchmark.title, unit="questions", doing=f"asking {answerer.model}") as progress:
            progress(len(known), len(questions))
            for batch, answers in answerer.answers(benchmark, preparation, rest):
                file.add(batch, answers)
                progress(len(file.known(questions)), len(questions))
        known = file.known(questions)
    answered = [Answered(question, known[question.id]) for question in questions]
    return score_of(benchmark, answered, num_all=asked.num_all)
