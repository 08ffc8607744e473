"""Answers under pruning: a file of predictions for each selector and share, which another run uses again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.config.provenance import replace_text
from pipeline.errors import ConfigError, PipelineError, writing
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.questions import Question
from pipeline.progress import Progress
from pipeline.twig.decoding.generate import Decoding, answer
from pipeline.twig.decoding.prompts import Prompts
from pipeline.twig.evaluation.asking import Asker, key_of
from pipeline.twig.evaluation.selectors import Selector
from pipeline.twig.module import Twig

SETTINGS = "settings.json"
WHOLE = "no pruning"
NAMES = {field.name for field in fields(Prediction)}


@dataclass(frozen=True)
class Pruned:
    """What is measured: a selector's name at a share of vision tokens; `twig` is a digest where it has a part in it.

    `keep` None is the base without pruning.
    """

    selector: str
    keep: Fraction | None = None
    twig: str = ""

    @property
    def file(self) -> str:
        """The name of its file of predictions."""
        share = "" if self.keep is None else f"_{self.keep.numerator}-{self.keep.denominator}"
        twig = f"_{self.twig[:12]}" if self.twig else ""
        return f"{re.sub('[^a-zA-Z0-9+]+', '-', self.selector).strip('-')}{twig}{share}.jsonl"


def open_folder(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Begin or resume a folder of predictions.

    Raises `ConfigError` if it was made with other settings, unless they are to be overwritten.
    """
    file = folder / SETTINGS
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if file.is_file():
        known = _read_json(file)
        if changed := [name for name in settings if known.get(name) != settings[name]]:
            raise ConfigError(
                f"{folder}: its predictions were made with another {' and '.join(changed)} than is asked for; add "
                "--overwrite to replace them, or name another folder as --output"
            )
        return
    with writing(folder, then="name another folder as --output"):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(settings, indent=1) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise PipelineError(f"{file} is damaged; add --overwrite to evaluate again") from error


def answer_whole(asker: Asker, folder: Path) -> list[Prediction]:
    """Return the base's answers without pruning."""
    file, plain = folder / Pruned(WHOLE).file, Decoding(asker.max_new_tokens, asker.stop_ids, delta=0)
    if not file.is_file():
        made: list[Prediction] = []
        for questions, prompts in _batches(asker, WHOLE):
            made += asker.predictions(questions, answer(asker.base, None, prompts, plain))
        _write(file, made, Pruned(WHOLE))
    return read_pruned(file)


def answer_pruned(
    asker: Asker, twig: Twig, selector: Selector, shares: Sequence[Fraction], digest: str, folder: Path
) -> dict[Pruned, list[Prediction]]:
    """Return the answers with a selector at each share, of a twig with this digest. Vision tokens are scored once."""
    of_twig = digest if selector.depends_on_twig else ""
    every = [Pruned(selector.name, share, of_twig) for share in shares]
    missing = [one for one in every if not (folder / one.file).is_file()]
    made: dict[Pruned, list[Prediction]] = {one: [] for one in missing}
    if missing:
        for questions, prompts in _batches(asker, selector.name):
            keys = [key_of(question) for question in questions]
            scores = selector.score(asker.base, twig, prompts, keys)
            for one in missing:
                assert one.keep is not None
                how = Decoding(asker.max_new_tokens, asker.stop_ids, float(one.keep), delta=0)
                answers = answer(asker.base, twig, prompts, how, scores=scores)
                made[one] += asker.predictions(questions, answers)
    for one, predictions in made.items():
        _write(folder / one.file, predictions, one)
    return {one: read_pruned(folder / one.file) for one in every}


def _batches(asker: Asker, name: str) -> Iterator[tuple[list[Question], Prompts]]:
    """Yield the batches of an asker, and show the progress."""
    done, total = 0, len(asker.questions)
    with Progress(name, unit="questions", doing="answering") as progress:
        for questions, prompts in asker.in_batches():
            progress(done, total)
            yield questions, prompts
            done += len(questions)
        progress(done, total)


def _write(file: Path, predictions: Sequence[Prediction], made: Pruned) -> None:
    """Write all lines or none: who reads the file may not know how many there should be."""
    how = {"selector": made.selector, "keep": None if made.keep is None else str(made.keep)}
    ordered = sorted(predictions, key=lambda one: (one.test_set, one.key))
    replace_text(file, "".join(json.dumps(asdict(one) | how) + "\n" for one in ordered))


def read_pruned(file: Path) -> list[Prediction]:
    """Read a file of predictions. Raises `PipelineError` if it is damaged."""
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [Prediction(**{name: row[name] for name in row.keys() & NAMES}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise PipelineError(f"{file} is damaged; remove it and evaluate again") from error
