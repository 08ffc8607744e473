"""`alignkd plan`: within 5% of what is then written, and the cheapest settings that fit."""

from __future__ import annotations

import json
import random
import re
import tarfile

import pytest
from small_experiment import one, picture, text

import cli
from cache import part_sizes, summarise
from pipeline.errors import ConfigError
from pipeline.packing.pack import pack
from pipeline.progress import Progress
from pipeline.targets.attention import AttentionTarget
from pipeline.targets.final_hidden import FinalHiddenTarget
from pipeline.targets.hidden_states import HiddenStatesTarget
from pipeline.targets.logits import LogitsTarget
from pipeline.targets.query_attention import QueryAttentionTarget
from pipeline.targets.target import TeacherFacts
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.describe import parse_bytes
from pipeline.upkeep.plan import cheaper_settings, plan_store, plan_within
from pipeline.upkeep.plan_costs import Costs, advice, what_recomputes

WORDS = ("red", "green", "circle", "triangle", "line", "image", "colour", "blue", "shape", "brown")


@pytest.fixture(scope="module")
def many(experiment, tmp_path_factory):
    """120 samples of many lengths in three shards, of 40 images and of none; the overrides that cache them."""
    folder = tmp_path_factory.mktemp("plan")
    chance = random.Random(0)
    (folder / "images").mkdir()
    for number in range(40):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
    records = []
    for number in range(120):
        words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 30)))
        make = text if number % 10 == 9 else lambda name, *turns, n=number: one(name, n // 3, *turns)
        records.append(make(f"s{number}", f"{words}?", chance.choice(WORDS)))
    (folder / "records.json").write_text(json.dumps(records))
    pack(folder / "records.json", folder / "shards", image_folder=folder / "images", samples_per_shard=40)
    return [f"data.shards={folder}/shards", "data.max_length=400"]


CODED = ["targets.attention.codec=sqrt_uint8", "targets.vision.codec=fixed_point"]


@pytest.mark.parametrize("settings", [[], CODED], ids=["float32", "coded"])
@pytest.mark.parametrize("is_counted", [True, False])
def test_the_plan_is_within_5_percent_of_what_is_written(is_counted, settings, many, experiment, tmp_path):
    config = experiment.config(tmp_path, *many, *settings, f"cache.path={tmp_path}/store")
    if not is_counted:
        linked = tmp_path / "shards"
        linked.mkdir()
        for shard in sorted((tmp_path / many[0].removeprefix("data.shards=")).glob("*.tar")):
            (linked / shard.name).symlink_to(shard)
        config = experiment.config(
            tmp_path, *many, *settings, f"cache.path={tmp_path}/store", f"data.shards={linked}"
        )
    plan = plan_store(config, num_samples=60)
    assert (plan.num_samples_known, plan.probed_samples, plan.num_shards) == (is_counted, 60, 3)
    assert not (tmp_path / "store").exists()
    cache_teacher(config)
    written = summarise(tmp_path / "store")
    assert plan.num_samples == pytest.approx(120, rel=0.05)
    assert plan.total_bytes == pytest.approx(written.bytes, rel=0.05)
    for target in plan.targets:
        arrays = [part.array_bytes for part in part_sizes(tmp_path / "store")]
        written_bytes = sum(part[name] for part in arrays for name in target.stated_errors)
        assert target.total_bytes == pytest.approx(written_bytes, rel=0.2)  # of 6 kB, headers are a part
    assert plan.seconds > 0 and plan.fits
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_reading_and_making_again_are_measured_not_assumed(many, experiment, tmp_path):
    overrides = [*many, f"cache.path={tmp_path}/store", "targets.vision.source=recompute"]
    targets = {
        target.name: target
        for target in plan_store(experiment.config(tmp_path, *overrides), num_samples=24).targets
    }
    attention, vision, logits = (targets[name] for name in ("attention", "vision", "logits"))
    assert 0 < attention.reading_seconds < 1 and 0 < attention.forward_seconds < 5
    assert attention.advice.endswith(
        f"{1000 * attention.reading_seconds:.2f} ms to read a sample, {1000 * attention.forward_seconds:.2f} ms "
        "to recompute it (the tower, the projector and 1 of 3 layers)"
    )
    assert vision.reading_seconds == 0 < vision.forward_seconds
    assert vision.advice.startswith("recompute: no bytes; ") and "0 of 3 layers" in vision.advice
    assert (logits.reading_seconds, logits.forward_seconds) == (0, 0)


def test_a_twigs_targets_are_measured_too_the_final_hidden_states_with_the_whole_teacher(
    many, experiment, tmp_path
):
    twig = "targets={hidden_states: {layer: 1}, final_hidden: {}, query_attention: {layer: 1}}"
    overrides = [*many, f"cache.path={tmp_path}/store", twig, "losses={supervised: {}}"]
    config = experiment.config(tmp_path, *overrides)
    targets = {target.name: target for target in plan_store(config, num_samples=24).targets}
    runs = {"hidden_states": "the decoder's first 1 layers)", "final_hidden": "(the whole teacher)",
            "query_attention": "1 of 3 layers)"}  # fmt: skip
    for name, part in runs.items():
        assert targets[name].advice.endswith(part)
        assert 0 < targets[name].reading_seconds < 1 and 0 < targets[name].forward_seconds < 5
    assert targets["hidden_states"].bytes_per_sample > targets["final_hidden"].bytes_per_sample > 0
    assert list(cheaper_settings(config))[-1] == {
        "targets.hidden_states.source": "recompute", "targets.final_hidden.source": "recompute",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("reading", "forward", "size", "choice"),
    [
        (0.001, 0.002, 1_000, "store: 1.00 ms to read a sample, 2.00 ms to recompute it (the tower"),
        (0.002, 0.001, 1_000, "recompute: 2.00 ms to read a sample, 1.00 ms to recompute it (the tower"),
        (0.001, 0.003, 1_000_000, "recompute: 1.00 ms to read"),  # a large one is worth some patience
        (0.001, 0.005, 1_000_000, "store: 1.00 ms to read"),
    ],
)
def test_the_quicker_way_is_advised_and_bytes_weigh_where_they_are_many(reading, forward, size, choice):
    runs = what_recomputes(AttentionTarget(), TeacherFacts("some/teacher", 32, 4, 32, 96))
    assert advice(Costs(reading, forward), bytes_each=size, runs=runs).startswith(choice)


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        (AttentionTarget(layers=[0, 3]), "the tower, the projector and 3 of 32 layers"),
        (HiddenStatesTarget(layer=2), "the tower, the projector and the decoder's first 2 layers"),
        (QueryAttentionTarget(layer=19), "the tower, the projector and 19 of 32 layers"),
        (FinalHiddenTarget(), "the whole teacher"),
        (LogitsTarget(), None),
    ],
)
def test_the_advice_says_which_part_of_the_teacher_would_run(target, runs):
    assert what_recomputes(target, TeacherFacts("some/teacher", 32, 4, 32, 96)) == runs


def test_cheaper_settings_leave_out_draws_before_they_shorten_the_top(experiment, tmp_path):
    config = experiment.config(tmp_path, "targets.logits.top_k=16", "targets.logits.tail_samples=4")
    assert [list(settings)[-1:] for settings in cheaper_settings(config)][-2:] == [
        ["targets.logits.tail_samples"], ["targets.logits.top_k"],
    ]  # fmt: skip


def test_cheaper_settings_grow_smaller_until_only_logits_are_stored(experiment, tmp_path):
    ladder = list(cheaper_settings(experiment.config(tmp_path)))
    assert ladder[0] == {} and ladder[-1] == {
        "targets.attention.source": "recompute", "targets.vision.codec": "int8", "targets.vision.source": "recompute",
    }  # fmt: skip


class Watched(Progress):
    """Keeps what it receives."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.counts: list[tuple[int, int | None]] = []
        super().__init__("plan", unit="samples", doing="")

    def step(self, doing: str) -> None:
        super().step(doing)
        self.steps.append(doing)

    def __call__(self, done: int, total: int | None) -> None:
        super().__call__(done, total)
        self.counts.append((done, total))


def test_the_first_settings_that_fit_are_chosen(many, experiment, tmp_path):
    config = experiment.config(tmp_path, *many, f"cache.path={tmp_path}/store")
    progress = Watched()
    whole = plan_store(config, num_samples=60, progress=progress)
    assert [step.split()[0] for step in progress.steps[1:]] == ["reading", "probing", "measuring"]
    assert "probing 60 samples of " in progress.steps[2]
    assert progress.counts[-1] == (60, 60) and len(progress.counts) > 3
    assert {total for _, total in progress.counts} == {60}
    assert plan_within(config, max_bytes=whole.total_bytes * 1.01, num_samples=60).settings == {}
    less = plan_within(config, max_bytes=whole.total_bytes * 0.99, num_samples=60)
    assert less.settings == {"targets.attention.source": "recompute"} and less.total_bytes < whole.total_bytes
    assert {target.name: target.source for target in less.targets} == {
        "attention": "recompute", "vision": "cache", "logits": "cache",
    }  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"--max-bytes: even with .*source=recompute the store takes [\d,]+ bytes, not 1,000",
    ):
        plan_within(config, max_bytes=1000, num_samples=60)


def test_the_command_tells_bytes_hours_disk_and_advice(experiment, many, tmp_path, capsys):
    command = [
        "plan",
        "--config",
        str(experiment.file),
        *many,
        f"cache.path={tmp_path}/store",
        "--samples",
        "24",
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert shown.startswith(
        f"{tmp_path}/store: 3 shards, 120 samples (counted when packed); 24 probed\n\ntarget"
    )
    assert "logits: store: it needs the whole teacher" in shown
    assert re.search(r"stage 1: [\d.]+ (seconds?|minutes) on this machine, at the probe's speed", shown)
    assert "disk: " in shown and not (tmp_path / "store").exists()
    with pytest.raises(SystemExit):
        cli.main([*command, "--max-bytes", "1GB", "--json"])
    assert json.loads(capsys.readouterr().out)["settings"] == {}


def plan_in_words(experiment, folder, capsys, *overrides: str) -> tuple[str, object]:
    line = [
        "plan",
        "--config",
        str(experiment.file),
        *overrides,
        f"cache.path={folder}/store",
        "--samples",
        "24",
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main(line)
    return capsys.readouterr().out, stopped.value.code


def test_rejected_samples_of_the_probe_are_said_with_their_reasons(experiment, many, tmp_path, capsys):
    shown, code = plan_in_words(experiment, tmp_path, capsys, *many, "data.max_length=60")
    assert code == 0 and "logits: store: it needs" in shown
    found = re.search(r"(\d+) of 24 probed samples rejected, such as: too long: \d+ positions with", shown)
    assert found and 0 < int(found[1]) < 24


def test_where_all_samples_of_the_probe_are_rejected_no_figure_is_given(experiment, many, tmp_path, capsys):
    shown, code = plan_in_words(experiment, tmp_path, capsys, *many, "data.max_length=3")
    assert code == 1
    assert "3 shards; all 24 probed samples were rejected: nothing can be said of bytes and hours" in shown
    assert "24 of 24 probed samples rejected, such as: too long: " in shown
    assert "recompute" not in shown and "disk" not in shown


def test_shards_without_one_usable_sample_are_said_to_be_so(experiment, tmp_path, capsys):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(3):
            tar.addfile(tarfile.TarInfo(f"{number}.json"))
    shown, code = plan_in_words(experiment, tmp_path, capsys, f"data.shards={tmp_path}/bad.tar")
    assert code == 1 and "all 3 probed samples were rejected" in shown
    assert "3 of 3 probed samples rejected, such as: broken JSON" in shown


@pytest.mark.parametrize(
    ("text", "size"), [("500GB", 500e9), ("1.5 TiB", 1.5 * 2**40), ("1000", 1000), ("2MB", 2e6)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "5 parsecs", "-1GB"])
def test_what_is_no_size_is_a_sentence(text):
    with pytest.raises(ConfigError, match=r"expected a size such as 500GB"):
        parse_bytes(text)
