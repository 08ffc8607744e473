"""`alignkd twig evaluate`: accuracy kept under pruning, speed with drafts, and pictures, of one or several twigs."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from cache import digest_of
from pipeline.config.config import Config
from pipeline.config.provenance import provenance
from pipeline.errors import ConfigError
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.scores import held_out_digests
from pipeline.models.files.checkpoint import digest_of_tensor, digest_of_tensors
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.evaluation.asking import Asker
from pipeline.twig.evaluation.kept import WHOLE, Pruned, answer_pruned, answer_whole, open_folder
from pipeline.twig.evaluation.pictures import draw_kept, seen_by
from pipeline.twig.evaluation.result import PICTURE, Evaluation
from pipeline.twig.evaluation.scoring import METRIC_OF, kept_rows, kinds_of
from pipeline.twig.evaluation.selectors import TWIG, Selector, parse_selectors
from pipeline.twig.evaluation.speed import measure_speed
from pipeline.twig.evaluation.ways import check_extras
from pipeline.twig.folder import load_twig, read_twig_config
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Asked:
    """What to measure. `turns` 0: no speed; `limit` images of each test set, None: all.

    `beside` are folders of other twigs of the same base and place, by the name of their training.
    """

    selectors: str
    shares: Sequence[Fraction]
    turns: int
    prompts: int
    extras: Sequence[str] = ()
    limit: int | None = None
    overwrite: bool = False
    beside: Mapping[str, Sequence[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """Twigs of one geometry, and the digests of their tensors."""

    twigs: list[Twig]
    digests: list[str]
    geometry: Geometry

    @classmethod
    def of(cls, folders: Sequence[Path], geometry: Geometry, network: Any) -> Loaded:
        """Load twigs. Raises `ConfigError` if two are the same, or one belongs to another base."""
        twigs = [load_twig(folder, network) for folder in folders]
        digests = [_digest(twig) for twig in twigs]
        if len(set(digests)) < len(digests):
            raise ConfigError("two of the twigs are the same; name each one once")
        return cls(twigs, digests, geometry)


def _geometry_of(folders: Sequence[Path]) -> Geometry:
    """Return the geometry of all twigs. Raises `ConfigError` if they differ in it."""
    geometries = [read_twig_config(folder)[0] for folder in folders]
    if len(set(geometries)) > 1:
        found = " and ".join(map(str, dict.fromkeys(map(_places, geometries))))
        raise ConfigError(
            f"twigs of one evaluation differ in their seeds alone, found (K, T, Kf) {found}; evaluate twigs of "
            "another geometry by a command of their own, with another output_dir"
        )
    return geometries[0]


def _places(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.attach_layer, geometry.num_layers, geometry.wipe_layer


def _digest(twig: Twig) -> str:
    return digest_of_tensors({name: digest_of_tensor(tensor) for name, tensor in twig.state_dict().items()})


def evaluate_twigs(
    config: Config, folders: Sequence[Path], asked: Asked, output: Path, *, say: Callable[[str], None]
) -> Evaluation:
    """Measure twigs of the config's teacher on its held-out questions, and write what was found to `output`."""
    # What can be refused is refused before the base is loaded.
    geometry = _geometry_of([*folders, *(folder for others in asked.beside.values() for folder in others)])
    selectors = parse_selectors(asked.selectors, geometry)
    check_extras(asked.extras)
    asker = Asker.of(config, limit=asked.limit)
    if asker.num_text_only:
        say(_left_out(asker.num_text_only))
    loaded = Loaded.of(folders, geometry, asker.base.network)
    for share in asked.shares:
        for number in {sum(question.sizes) for question in asker.questions}:
            loaded.geometry.num_kept(number, float(share))  # refuses a share that cannot be kept
    predictions = output / PREDICTIONS
    open_folder(predictions, _settings(config, asker, loaded, asked), overwrite=asked.overwrite)
    whole = answer_whole(asker, predictions)
    runs = _runs(asker, loaded, selectors, asked.shares, predictions)
    for name, others in asked.beside.items():
        named = [replace(parse_selectors(TWIG, geometry)[0], name=name)]
        of_name = Loaded.of(others, geometry, asker.base.network)
        runs |= _runs(asker, of_name, named, asked.shares, predictions)
    kinds, notes = kinds_of(whole), []
    speed = []
    if asked.turns:
        speed = measure_speed(
            asker, loaded.twigs, asked.shares,
            kinds=kinds, turns=asked.turns, prompts=asked.prompts, extras=asked.extras,
        )  # fmt: skip
    notes += _draw(asker, loaded, selectors, min(asked.shares), whole, runs, output)
    base = BaseIdentity.of_network(asker.base.network)
    made = Evaluation(
        kept=kept_rows(whole, runs),
        speed=speed,
        base=config.teacher.model,
        base_digest=base.digest,
        twigs=loaded.digests,
        geometry=vars(loaded.geometry),
        types={kind: METRIC_OF[length] for kind, length in kinds.items()},
        max_new_tokens=asker.max_new_tokens,
        dtype=str(asker.base.network.dtype).removeprefix("torch."),
        turns=asked.turns,
        threads=torch.get_num_threads(),
        machine=_machine(asker),
        notes=[],
        provenance=provenance(config),
    )
    made.notes.extend([*_notes(made, asker, asked), *notes])
    made.write(output)
    return made


def _settings(config: Config, asker: Asker, loaded: Loaded, asked: Asked) -> dict[str, Any]:
    """Return what predictions depend on beside selector, share and twig."""
    assert config.evaluate is not None
    return {
        "base": BaseIdentity.of_network(asker.base.network).digest,
        "geometry": list(_places(loaded.geometry)),
        "questions": digest_of([held_out_digests(config.evaluate), asker.preparation.digests()]),
        "max_new_tokens": asker.max_new_tokens,
        "limit": asked.limit,
    }


def _runs(
    asker: Asker, loaded: Loaded, selectors: Sequence[Selector], shares: Sequence[Fraction], folder: Path
) -> dict[Pruned, list[Prediction]]:
    runs: dict[Pruned, list[Prediction]] = {}
    for selector in selectors:
        some = slice(None) if selector.depends_on_twig else slice(1)
        for twig, digest in zip(loaded.twigs[some], loaded.digests[some], strict=True):
            runs |= answer_pruned(asker, twig, selector, shares, digest, folder)
    return runs


def _draw(
    asker: Asker,
    loaded: Loaded,
    selectors: Sequence[Selector],
    share: Fraction,
    whole: Sequence[Prediction],
    runs: Mapping[Pruned, Sequence[Prediction]],
    output: Path,
) -> list[str]:
    """Draw what the first twig and the other selectors keep; return why nothing was drawn."""
    seen, notes = seen_by(asker, loaded.twigs[0], selectors, share)
    (output / PICTURE).unlink(missing_ok=True)
    if seen:
        of_first = {
            run.selector: predictions
            for run, predictions in runs.items()
            if run.keep == share and run.twig in ("", loaded.digests[0])
        }
        draw_kept(seen, {WHOLE: whole} | of_first, share, output / PICTURE)
    return notes


def _machine(asker: Asker) -> str:
    if asker.base.network.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {platform.system()}"


def _notes(made: Evaluation, asker: Asker, asked: Asked) -> list[str]:
    """Return how the numbers were made, as sentences for the tables and the report."""
    images = len({question.unanswered.group for question in asker.questions})
    notes = [
        f"{len(asker.questions):,} questions about {images:,} images, {made.dtype}, answers of at most "
        f"{made.max_new_tokens} tokens. Accuracy kept: score with pruning over score without; 95% intervals of a "
        "paired bootstrap over images"
        + (
            f", mean over {len(made.twigs)} twigs drawn from Student's t."
            if len(made.twigs) > 1
            else ", one twig."
        ),
    ]
    if asker.num_text_only:
        notes.append(f"{_left_out(asker.num_text_only)}.")
    if made.speed:
        notes.append(
            f"Speed: {made.turns} alternating turns of {asked.prompts} prompts, one at a time, in one process on "
            f"{made.threads} {'thread' if made.threads == 1 else 'threads'} of {made.machine}; prefill included, "
            "vision tower excluded; ratios are to the base without a twig in the same turn: median [smallest, "
            "largest]. Operations are multiply-adds of layers and heads, as a ratio, without products of attention."
            + (" The twigs take turns." if len(made.twigs) > 1 else "")
        )
    return notes


def _left_out(number: int) -> str:
    return f"left out: {number:,} {'question' if number == 1 else 'questions'} without an image"
