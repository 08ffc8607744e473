"""Speed: every way to answer the same prompts in alternating turns, in one process, one prompt at a time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from pipeline.progress import Progress
from pipeline.ratios import Ratios
from pipeline.twig.evaluation.asking import Asker, spread
from pipeline.twig.evaluation.result import SpeedRow
from pipeline.twig.evaluation.scoring import LONG, SHORT
from pipeline.twig.evaluation.ways import Prepared, Timed, Way, ways_of
from pipeline.twig.module import Twig

# Way -> its answers of each turn.
Turns = Mapping[str, Sequence[Sequence[Timed]]]


def measure_speed(
    asker: Asker,
    twigs: Sequence[Twig],
    shares: Sequence[Fraction],
    *,
    kinds: Mapping[str, str],
    turns: int,
    prompts: int,
    extras: Sequence[str] = (),
) -> list[SpeedRow]:
    """Return a row for each way, of short and of long questions; `kinds` is question type -> `short` or `long`.

    Each turn asks `prompts` other questions. Several twigs take turns, too.
    """
    rows: list[SpeedRow] = []
    ways = ways_of(asker, shares, extras)
    for kind in (SHORT, LONG):
        some = [one for one in asker.questions if kinds[one.unanswered.question_type] == kind]
        if some:
            chosen = spread(sorted(some, key=lambda one: one.unanswered.key), turns * prompts)
            prepared = [Prepared.of(asker, one) for one in chosen]
            made = _turns(ways, twigs, prepared, turns=turns, prompts=prompts, kind=kind)
            rows += [_row(kind, way, made, len(prepared)) for way in ways]
    return rows


def _turns(
    ways: Sequence[Way],
    twigs: Sequence[Twig],
    prepared: Sequence[Prepared],
    *,
    turns: int,
    prompts: int,
    kind: str,
) -> dict[str, list[list[Timed]]]:
    """Let every way answer the questions of each turn, each turn beginning with another way, after a warm-up."""
    made: dict[str, list[list[Timed]]] = {way.name: [] for way in ways}
    for way in ways:
        way.run(prepared[0], twigs[0])
    with Progress(f"speed, {kind}", unit="turns", doing="answering") as progress:
        for turn in range(turns):
            progress(turn, turns)
            asked = [prepared[(turn * prompts + n) % len(prepared)] for n in range(prompts)]
            for step in range(len(ways)):
                way = ways[(turn + step) % len(ways)]
                made[way.name].append([way.run(one, twigs[turn % len(twigs)]) for one in asked])
        progress(turns, turns)
    return made


def _row(kind: str, way: Way, made: Turns, num_prompts: int) -> SpeedRow:
    base = next(iter(made))
    ours, theirs = made[way.name], made[base]
    answers = [one for turn in ours for one in turn]
    operations, of_base = _operations(answers), _operations([one for turn in theirs for one in turn])
    drafted, passes = sum(one.drafted for one in answers), sum(one.passes for one in answers)
    is_base = way.name == base
    return SpeedRow(
        kind=kind,
        way=way.name,
        answers=num_prompts,
        acceptance=sum(one.accepted for one in answers) / drafted if drafted else None,
        tokens_a_pass=sum(len(one.tokens) for one in answers) / passes if passes else None,
        tokens_a_second=statistics.median(map(_tokens_a_second, ours)),
        seconds=statistics.median(map(_seconds, ours)),
        tokens_ratio=None if is_base else _ratios(_tokens_a_second, ours, theirs),
        time_ratio=None if is_base else _ratios(_seconds, theirs, ours),
        operations=operations,
        operations_ratio=operations / of_base if operations and of_base else None,
        same=_same(ours, made[way.like]) if way.like else None,
    )


def _ratios(
    of: Callable[[Sequence[Timed]], float],
    ours: Sequence[Sequence[Timed]],
    theirs: Sequence[Sequence[Timed]],
) -> Ratios:
    return Ratios.of([of(turn) for turn in ours], [of(turn) for turn in theirs])


def _tokens_a_second(turn: Sequence[Timed]) -> float:
    return sum(len(one.tokens) for one in turn) / sum(one.seconds for one in turn)


def _seconds(turn: Sequence[Timed]) -> float:
    """Return the mean time of an answer."""
    return sum(one.seconds for one in turn) / len(turn)


def _operations(answers: Sequence[Timed]) -> float | None:
    counts = [one.operations for one in answers if one.operations is not None]
    return statistics.fmean(counts) if counts else None


def _same(ours: Sequence[Sequence[Timed]], theirs: Sequence[Sequence[Timed]]) -> float:
    """Return the share of answers with the same tokens."""
    pairs = [pair for mine, other in zip(ours, theirs, strict=True) for pair in zip(mine, other, strict=True)]
    return statistics.fmean(one.tokens == other.tokens for one, other in pairs)
