"""`alignkd twig evaluate` on a tiny base: numbers, resuming, speed, refusals, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_experiment import Experiment, build_experiment, held_out_records
from small_models import tiny_model
from small_sweep import write_sweep, write_timed_store

import cli
from pipeline.config.config import Config
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.models.loading import load_network
from pipeline.packing.pack import pack
from pipeline.ratios import Ratios
from pipeline.report.page import write_report
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.evaluation.beside import parse_beside
from pipeline.twig.evaluation.kept import WHOLE, Pruned, read_pruned
from pipeline.twig.evaluation.result import FOLDER, PICTURE, RESULT, Evaluation, SpeedRow
from pipeline.twig.evaluation.tables import tables_of
from pipeline.twig.folder import save_twig
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

GEOMETRY = Geometry(attach_layer=1, num_layers=1, wipe_layer=2, num_base_layers=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An experiment without a store, whose base answers half of the questions right."""
    made = build_experiment(tmp_path_factory.mktemp("small"), tiny_model)
    config = made.config(made.file.parent / "out")
    assert config.evaluate is not None
    said = evaluate_model(
        str(made.teacher), config.data, config.evaluate, output=made.file.parent / "said.jsonl"
    )
    texts = {one.key: one.prediction.strip() for one in said}
    records = held_out_records()
    for record in records[::2]:
        record["conversations"][-1]["value"] = texts[record["id"]] or "nothing"
    annotations = made.file.parent / "right.json"
    annotations.write_text(json.dumps(records))
    pack(
        annotations, made.file.parent / "right", image_folder=made.file.parent / "images", samples_per_shard=5
    )
    return replace(made, held_out=made.file.parent / "right")


def write_twig(folder: Path, base: Path, *, seed: int, geometry: Geometry = GEOMETRY) -> Path:
    network = load_network(str(base), dtype=torch.float32)
    twig = Twig.copied(network, geometry)
    with torch.no_grad():
        for parameter in twig.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.1
            )
    save_twig(folder, dict(twig.state_dict()), geometry, BaseIdentity.of_checkpoint(str(base)))
    return folder


@pytest.fixture(scope="module")
def twigs(small: Experiment) -> list[Path]:
    return [write_twig(small.file.parent / f"twig{seed}", small.teacher, seed=seed) for seed in (0, 1)]


def run(small: Experiment, output: Path, *arguments: str, code: int = 0) -> None:
    overrides = [f"output_dir={output}", f"evaluate.shards={small.held_out}"]
    command = ["twig", "evaluate", "--config", str(small.file), *arguments, *overrides]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == code


@pytest.mark.slow
def test_the_command_measures_answers_resumes_and_is_shown_by_the_report(small, twigs, tmp_path, capsys):
    some = ["--twig", str(twigs[0]), "--twig", str(twigs[1]), "--keep", "1/2"]
    speed = ["--turns", "2", "--prompts", "2", "--ways", "auto,look_up,tree"]
    run(small, tmp_path, *some, *speed, "--selectors", "twig,fastv,random,layer 2")
    shown = capsys.readouterr()
    folder = tmp_path / FOLDER
    result = Evaluation.read(folder / RESULT)
    assert "left out: 1 question without an image" in shown.err
    assert shown.out.strip() == tables_of(result) and "accuracy kept, %" in shown.out
    assert result.selectors() == ["twig", "fastv (layer 0)", "random", "layer 2"]
    assert len(result.twigs) == 2 and result.geometry["attach_layer"] == 1
    short = result.rows("test", "short", "twig")[0]
    assert (short.questions, short.images) == (5, 4) and len(short.by_twig) == 2 and short.whole > 0
    assert all(
        (folder / name).is_file() for name in (PICTURE, "kept_curve.png", "speed_curve.svg", "tradeoff.png")
    )
    config = Config.model_validate(small.config(tmp_path, f"evaluate.shards={small.held_out}").model_dump())
    assert config.evaluate is not None
    plain = evaluate_model(str(small.teacher), config.data, config.evaluate, output=tmp_path / "plain.jsonl")
    whole = read_pruned(folder / "predictions" / Pruned(WHOLE).file)
    assert {one.key: one.prediction for one in whole} == {
        one.key: one.prediction for one in plain if one.key != "h3"
    }
    check_speed(result.speed)
    check_resumed(small, tmp_path, some, capsys)
    check_report(folder, tmp_path)


@pytest.mark.slow
def test_twigs_of_another_training_stand_beside_the_first_as_selectors_of_their_name(
    small, twigs, tmp_path, capsys
):
    some = ["--twig", str(twigs[0]), "--beside", f"stage 1 = {twigs[1]}", "--keep", "1/2", "--no-speed"]
    run(small, tmp_path, *some, "--selectors", "twig,random")
    result = Evaluation.read(tmp_path / FOLDER / RESULT)
    assert result.selectors() == ["twig", "random", "stage 1"]
    mine, other = (result.rows("test", "short", name)[0] for name in ("twig", "stage 1"))
    assert mine.beside_twig is None and other.beside_twig is not None
    middle = other.by_twig[0] - mine.by_twig[0]
    assert other.beside_twig.value == pytest.approx(middle)
    alone = tmp_path / "alone"
    run(small, alone, "--twig", str(twigs[1]), "--keep", "1/2", "--no-speed", "--selectors", "twig")
    assert Evaluation.read(alone / FOLDER / RESULT).rows("test", "short", "twig")[0].by_twig == other.by_twig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("folder", "NAME=FOLDER was expected"),
        ("=folder", "NAME=FOLDER was expected"),
        ("random=folder", "'random' is the name of a selector"),
        ("layer 3=folder", "'layer 3' is the name of a selector"),
    ],
)
def test_what_is_no_name_of_a_training_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_beside([given])


def check_speed(rows: Sequence[SpeedRow]) -> None:
    ways = {row.way: row for row in rows}
    assert list(ways) == [
        "no twig", "twig", "1/2 kept", "twig, 1/2 kept", "twig, auto", "twig, look_up", "twig, tree",
        "generate of transformers",
    ]  # fmt: skip
    base, fast = ways["no twig"], ways["twig"]
    assert base.acceptance is None and base.tokens_a_pass == 1 and base.time_ratio is None
    assert base.operations_ratio == 1 and ways["1/2 kept"].operations_ratio != 1
    assert fast.acceptance is not None and isinstance(fast.time_ratio, Ratios) and fast.operations
    assert all(row.same == 1 for row in rows if row.same is not None)  # float32: the text is the base's own
    assert ways["generate of transformers"].operations is None and fast.same is not None


def check_resumed(small: Experiment, output: Path, some: Sequence[str], capsys) -> None:
    """Another selector adds a file; known ones are not computed again; other settings are refused."""
    folder = output / FOLDER / "predictions"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    run(small, output, *some, "--no-speed", "--selectors", "twig,layer 1")
    after = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert after.keys() - before.keys() == {"layer-1_1-2.jsonl"}
    assert all(after[name] == time for name, time in before.items())
    capsys.readouterr()
    run(small, output, *some, "--no-speed", "--limit", "2", code=2)
    assert "made with another limit than is asked for" in capsys.readouterr().err
    (folder / "layer-1_1-2.jsonl").write_text("no line of JSON\n")
    run(small, output, *some, "--no-speed", "--selectors", "layer 1", code=1)
    assert "layer-1_1-2.jsonl is damaged" in capsys.readouterr().err


def check_report(folder: Path, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", store=write_timed_store(tmp_path / "teacher.zarr"))
    assert "by a twig" not in write_report(sweep).read_text()
    alone = write_report(folder.parent).read_text()  # no training lies beside it
    assert "Pruned and drafted by a twig" in alone and "layer 1" in alone
    folder.rename(sweep / FOLDER)
    page = write_report(sweep).read_text()
    assert "Pruned and drafted by a twig" in page and page.count("data:image/png;base64,") == 1
    assert "accuracy kept, by vision tokens kept" in page and "layer 1" in page
    (sweep / FOLDER / RESULT).write_text("{}")
    with pytest.raises(PipelineError, match="damaged; run `alignkd twig evaluate` again"):
        write_report(sweep)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--selectors", "twig,best"), "selector 'best' is unknown"),
        (("--selectors", "layer 3"), "the base's layers are 0 to 2"),
        (("--keep", "1/9"), "keep: 0.1111 of "),
        (("--ways", "fast"), "ways: unknown 'fast'; known are auto, look_up, tree"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, complaint, small, twigs, tmp_path, capsys):
    run(small, tmp_path, "--twig", str(twigs[0]), "--keep", "1/2", *arguments, code=2)
    shown = capsys.readouterr().err
    assert complaint in shown and not (tmp_path / FOLDER).exists()
    # "left out" is printed when the base has been loaded, whose prompts alone say what a share comes to.
    assert ("left out" in shown) == ("--keep" in arguments)


@pytest.mark.slow
def test_a_file_in_the_place_of_the_folder_is_refused(small, twigs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = ["--twig", str(twigs[0]), "--keep", "1/2", "--no-speed", "--output", str(tmp_path / "file")]
    run(small, tmp_path, *place, code=1)
    shown = capsys.readouterr().err
    assert "cannot be written (" in shown and "name another folder as --output" in shown


@pytest.mark.slow
def test_twigs_that_do_not_fit_are_refused(small, twigs, tmp_path, capsys):
    other = write_twig(tmp_path / "other", small.student, seed=0, geometry=Geometry(1, 1, 2, 2))
    wide = write_twig(tmp_path / "wide", small.teacher, seed=0, geometry=Geometry(1, 2, 2, 3))
    for folders, complaint in (
        ([other], "belongs to a base with num_layers 2"),
        ([twigs[0], wide], "differ in their seeds alone"),
        ([twigs[0], twigs[0]], "two of the twigs are the same"),
        ([tmp_path / "none"], "no config.json; name a folder that `alignkd twig train` wrote"),
    ):
        run(small, tmp_path, *(part for one in folders for part in ("--twig", str(one))), code=2)
        assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_a_test_set_of_text_alone_has_nothing_to_prune(small, twigs, tmp_path, capsys):
    records = [one for one in held_out_records() if "image" not in one]
    (tmp_path / "text.json").write_text(json.dumps(records))
    pack(tmp_path / "text.json", tmp_path / "text", image_folder=tmp_path, samples_per_shard=5)
    run(replace(small, held_out=tmp_path / "text"), tmp_path, "--twig", str(twigs[0]), code=2)
    assert "none of the 1 questions has an image" in capsys.readouterr().err
