"""Shards behind URLs, printed by commands, or compressed: both stages give what they give of the disk."""

from __future__ import annotations

import gzip
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from servers import Static, StaticWithRanges, static_server
from small_experiment import Experiment, losses_of_steps, picture, stored_arrays, write_shard

from cache import Store, summarise
from cache.files import remote_files
from pipeline.data.shard_files import open_shard
from pipeline.data.shard_identity import shard_change, shard_source, source_of
from pipeline.data.shard_kinds import part_name
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Sample, read_shard
from pipeline.data.spans import SpanReader, warn_of_streams
from pipeline.distill.student import train_student
from pipeline.errors import ShardError
from pipeline.evaluation.evaluate import evaluate_model
from pipeline.teacher_cache.ahead import Ahead
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.plan import plan_store

pytestmark = pytest.mark.slow

THREE = "shard-{000000..000002}.tar"
TURNS = b'{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A."}]}'


@pytest.fixture(scope="module")
def in_bucket(bucket: str, experiment: Experiment) -> str:
    """The experiment's shards in a bucket."""
    fsspec.filesystem("s3").put(f"{experiment.shards}/*.tar", "lab/shards/")
    return f"{bucket}/shards"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    """A server that does not answer is asked again at once."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def captured(experiment: Experiment, folder: Path, shards: str) -> Path:
    """Return a store that stage 1 wrote of these shards."""
    config = experiment.config(folder, f"data.shards={shards!r}", f"cache.path={folder / 'teacher.zarr'}")
    summary = cache_teacher(config)
    assert (summary.parts_written, summary.broken, summary.changed) == (3, (), ())
    return folder / "teacher.zarr"


def trained(
    experiment: Experiment, folder: Path, store: Path, shards: str, *more: str
) -> list[dict[str, float]]:
    """Return the losses of a training from these shards."""
    config = experiment.config(folder, f"data.shards={shards!r}", f"cache.path={store}", *more)
    train_student(config, folder / "run")
    return losses_of_steps(folder / "run")


def same_stores(ours: Path, theirs: Path) -> bool:
    mine, other = stored_arrays(ours), stored_arrays(theirs)
    same = all(
        all(np.array_equal(a, b) for a, b in zip(mine[key][name], arrays[name], strict=True))
        for key, arrays in other.items()
        for name in arrays
    )
    entries = [[list(store.entries(part)) for part in store.parts] for store in map(Store, (ours, theirs))]
    return same and entries[0] == entries[1] and summarise(ours).content == summarise(theirs).content


# Both stages


def test_a_bucket_gives_the_store_and_the_losses_of_the_disk(experiment, in_bucket, tmp_path):
    store = captured(experiment, tmp_path / "a", in_bucket)
    assert same_stores(store, experiment.store)
    source = Store(store).source("shard-000001")
    disk = Store(experiment.store).source("shard-000001")
    assert {**source, "modified_ns": 0} == {**disk, "modified_ns": 0, "version": source["version"]}
    here = trained(experiment, tmp_path / "b", experiment.store, str(experiment.shards))
    assert trained(experiment, tmp_path / "c", store, in_bucket) == here and len(here) == 2
    # A store of the bucket's shards trains from the disk, and one of the disk's from the bucket.
    assert trained(experiment, tmp_path / "d", store, str(experiment.shards)) == here
    more = ["train.dataloader_num_workers=2", f"data.mirror={tmp_path / 'mirror'}"]
    assert trained(experiment, tmp_path / "e", experiment.store, in_bucket, *more) == here
    assert any((tmp_path / "mirror").rglob("*"))


def test_a_web_server_gives_the_store_and_the_losses_of_the_disk(experiment, tmp_path):
    with static_server(experiment.shards) as (url, requests):
        store = captured(experiment, tmp_path / "a", f"{url}/{THREE}")
        assert same_stores(store, experiment.store)
        # The probe for ranges, each shard in one piece, and before that its beginning for the blindness alarm: of
        # these small shards a whole one.
        pieces = [f"bytes=0-{experiment.shard(n).stat().st_size - 1}" for n in range(3)]
        assert sorted(str(place) for _, place in requests if place) == ["bytes=0-0", *sorted(2 * pieces)]
        here = trained(experiment, tmp_path / "b", experiment.store, str(experiment.shards))
        assert trained(experiment, tmp_path / "c", store, f"{url}/{THREE}") == here


def test_an_evaluation_and_a_plan_read_a_bucket(experiment, in_bucket, bucket, tmp_path):
    fsspec.filesystem("s3").put(f"{experiment.held_out}/*.tar", "lab/held_out/")
    answers = []
    for number, shards in enumerate((str(experiment.held_out), f"{bucket}/held_out")):
        config = experiment.config(tmp_path, f"evaluate.shards={shards}")
        assert config.evaluate is not None
        file = tmp_path / f"{number}.jsonl"
        answers.append(evaluate_model(str(experiment.student), config.data, config.evaluate, output=file))
    assert answers[0] == answers[1] and len(answers[0]) == 6
    copied = shutil.copytree(
        experiment.shards, tmp_path / "copied", ignore=shutil.ignore_patterns("pack.json")
    )
    here, there = (
        plan_store(experiment.config(tmp_path, f"data.shards={shards}", f"cache.path={tmp_path / 'new'}"))
        for shards in (copied, in_bucket)
    )
    assert here.num_samples == there.num_samples
    assert here.bytes_per_sample == pytest.approx(there.bytes_per_sample, rel=0.01)  # it holds other paths
    assert not here.num_samples_known and not there.num_samples_known


# Streams


@pytest.mark.parametrize("kind", ["pipe", "packed", "packed behind a URL", "without ranges"])
def test_a_stream_is_captured_with_a_warning_and_an_unpacked_copy_serves_stage_2(
    experiment, tmp_path, capsys, kind
):
    folder = tmp_path / "packed"
    folder.mkdir()
    for number in range(3):
        shard = experiment.shard(number)
        (folder / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
    handler = Static if kind == "without ranges" else StaticWithRanges
    with static_server(tmp_path if kind != "without ranges" else experiment.shards, handler) as (url, _):
        shards = {
            "pipe": f"pipe:cat {experiment.shards}/{THREE}",
            "packed": str(folder),
            "packed behind a URL": f"{url}/packed/{THREE}.gz",
            "without ranges": f"{url}/{THREE}",
        }[kind]
        store = captured(experiment, tmp_path / "a", shards)
        warned = capsys.readouterr().err
        assert warned.count("stage 2 will not be able to read") == 1 and "3 of 3 shards" in warned
        assert "put an uncompressed copy of the same name where ranges can be read" in warned
        with pytest.raises(
            ShardError, match=r"3 of 3 shards cannot be read in any order.*put an uncompressed"
        ):
            trained(experiment, tmp_path / "refused", store, shards)
    assert same_stores(store, experiment.store)
    here = trained(experiment, tmp_path / "b", experiment.store, str(experiment.shards))
    assert trained(experiment, tmp_path / "c", store, str(experiment.shards)) == here


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {shard}; exit 3", "failed with exit status 3"),
        ("head -c 1000 {shard}; false", "failed with exit status 1"),
        ("head -c 3000 {shard}", "truncated"),
        ("cat nowhere.tar", "failed with exit status 1"),
    ],
)
def test_a_command_that_fails_gives_no_short_shard(experiment, tmp_path, command, reason):
    shard = "pipe:" + command.format(shard=experiment.shard(0))
    with pytest.raises(ShardError, match=reason):
        list(read_shard(shard))
    store = tmp_path / "teacher.zarr"
    summary = cache_teacher(experiment.config(tmp_path, f"data.shards={shard!r}", f"cache.path={store}"))
    assert summary.parts_written == 0 and reason in summary.broken[0]


def test_a_truncated_gzip_file_is_no_shard(experiment, tmp_path):
    whole = gzip.compress(experiment.shard(0).read_bytes())
    (tmp_path / "s.tar.gz").write_bytes(whole[:-9])
    with pytest.raises(ShardError, match=r"s.tar.gz is damaged or truncated"):
        list(read_shard(tmp_path / "s.tar.gz"))
    (tmp_path / "s.tar.gz").write_bytes(experiment.shard(0).read_bytes())
    with pytest.raises(ShardError, match=r"s.tar.gz is damaged or truncated .*gzip"):
        list(read_shard(tmp_path / "s.tar.gz"))


def test_a_stream_is_read_no_further_than_asked(tmp_path):
    shard = write_shard(tmp_path / "s.tar", [(f"{n}.json", TURNS * 10_000) for n in range(20)])
    with open_shard(f"pipe:cat {shard}") as opened:
        assert len(opened.read_at(0, 100)) == 100
        assert opened.spool is not None and opened.spool.fetch(0) < shard.stat().st_size / 4
        data = shard.read_bytes()
        assert opened.read_at(5_000_000, 1000) == data[5_000_000:5_001_000]
        assert opened.read_at(7, 1000) == data[7:1007]


# Names


def test_names_of_parts_are_those_of_the_files():
    assert [
        part_name(shard)
        for shard in (
            "s3://b/x/a-0.tar",
            "https://h/a%20b.tar?token=x/y.z#f",
            "pipe:curl -s 'https://h/a.tar?sig=1' | zcat",
            "pipe:cat x/b.tar.gz | tee y.log",
            "pipe:make 3 # c.tar",
            "/x/d.tgz",
        )
    ] == ["a-0", "a b", "a", "b", "c", "d"]
    with pytest.raises(ShardError, match=r"names no file that ends with .tar.*add one to the command"):
        expand_shards("pipe:cat x")


def test_urls_are_expanded_as_paths_are(in_bucket, experiment, impatient):
    three = [f"{in_bucket}/shard-{n:06d}.tar" for n in range(3)]
    for pattern in ("", "/", "/*.tar", f"/{THREE}", "/shard-00000[012].tar"):
        assert expand_shards(in_bucket + pattern) == three
    assert expand_shards([three[2], three[0]]) == [three[0], three[2]]
    with pytest.raises(
        ShardError, match=r"1 of 4 shards behind URLs are missing, first .*000003.tar of .*\{"
    ):
        expand_shards(f"{in_bucket}/shard-{{000000..000003}}.tar")
    with pytest.raises(ShardError, match=r"No shard at s3://lab/nothing: .*lists no .tar"):
        expand_shards(f"{in_bucket}/../nothing".replace("shards/../", ""))
    with pytest.raises(ShardError, match=r"Two shards have one name, shard-000000"):
        expand_shards([str(experiment.shards), in_bucket])
    with static_server(experiment.shards) as (url, _):
        names = [f"{url}/shard-{n:06d}.tar" for n in range(3)]
        for pattern in ("", "/*.tar", f"/{THREE}"):
            assert expand_shards(url + pattern) == names
        with pytest.raises(
            ShardError, match=r"1 of 1 shards behind URLs are missing, first .*/none.tar; correct"
        ):
            expand_shards(f"{url}/none.tar")
    with pytest.raises(ShardError, match=r"127.0.0.1:9/a.tar.* cannot be reached"):
        expand_shards("http://127.0.0.1:9/a.tar")


def test_a_folder_gives_the_unpacked_copy_of_a_packed_shard(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [])
    for name in ("a.tar.gz", "c.tar.gz", "d.tgz", "._a.tar"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(shard).name for shard in expand_shards(str(tmp_path))]
    assert names == ["a.tar", "b.tar", "c.tar.gz", "d.tgz"]


# Servers that are slow, or die


class Slow(StaticWithRanges):
    """Answers after a while."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        time.sleep(0.1)
        super().do_GET()


@pytest.fixture
def many(tmp_path) -> Path:
    """A shard of 300 samples with an image each."""
    members: list[tuple[str, bytes]] = []
    for number in range(300):
        members += [(f"{number:03d}.json", TURNS), (f"{number:03d}.png", picture(number))]
    return write_shard(tmp_path / "served" / "s.tar", members)


def test_stage_1_asks_a_slow_server_for_blocks_and_stage_2_for_a_batch_at_once(many, monkeypatch):
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 1 << 16)
    with static_server(many.parent, Slow) as (url, requests):
        started = time.monotonic()
        samples = [item for item in read_shard(f"{url}/s.tar") if isinstance(item, Sample)]
        blocks = -(-many.stat().st_size // (1 << 16))
        assert len(samples) == 300 and blocks > 5
        assert sum(place is not None for _, place in requests) == blocks + 1
        assert time.monotonic() - started < 0.1 * (blocks + 3)
        requests.clear()
        chosen = samples[::20]
        places = [(f"{url}/s.tar", s) for one in chosen for s in (one.json_span, *one.image_spans)]
        started = time.monotonic()
        read = SpanReader().holding(places)
        assert time.monotonic() - started < 0.6 and len(requests) == len(chosen)
        assert [read(*place) for place in places[1::2]] == [one.images[0] for one in chosen]
        assert len(requests) == len(chosen)


def test_the_next_shard_is_fetched_meanwhile_once_and_dropped_when_nobody_wants_it(experiment, impatient):
    with static_server(experiment.shards) as (url, requests), Ahead() as ahead:
        first, second, third = expand_shards(f"{url}/{THREE}")
        with ahead.open(first) as opened:
            ahead.fetch(second)
            assert opened.read_at(0, 512)[:5]
        with ahead.open(second) as opened:
            data = experiment.shard(1).read_bytes()
            assert opened.read_at(0, len(data)) == data
        asked = [path for path, place in requests if place and place != "bytes=0-0"]
        assert sorted(asked) == ["/shard-000000.tar", "/shard-000001.tar"]
        ahead.fetch(third)
        with ahead.open(first) as opened:
            assert opened.read_at(0, 512) == experiment.shard(0).read_bytes()[:512]
        ahead.fetch(f"{url}/none.tar")
        with pytest.raises(ShardError, match=r"none.tar"), ahead.open(f"{url}/none.tar"):
            pass
        ahead.fetch(third)


class Dying(StaticWithRanges):
    """Breaks off in the middle of an answer as often as it is told."""

    deaths = 1

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        file = Path(self.translate_path(self.path))
        if self.headers.get("Range") == "bytes=0-0" or Dying.deaths == 0 or not file.is_file():
            return super().do_GET()
        Dying.deaths -= 1
        data = file.read_bytes()
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        self.connection.close()
        return None


class DyingWithoutRanges(Static):
    """The same, of a server that sends whole files only."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        file = Path(self.translate_path(self.path))
        if self.headers.get("Range") or Dying.deaths == 0 or not file.is_file():
            return super().do_GET()
        return Dying.do_GET(self)  # type: ignore[arg-type]


@pytest.mark.parametrize("handler", [Dying, DyingWithoutRanges])
@pytest.mark.parametrize("deaths", [1, 1000])
def test_a_server_that_dies_midway_is_asked_again_and_no_part_is_published(
    experiment, tmp_path, impatient, handler, deaths
):
    Dying.deaths = deaths
    with static_server(experiment.shards, handler) as (url, _):
        store = tmp_path / "teacher.zarr"
        shards = f"{url}/shard-000000.tar"
        summary = cache_teacher(experiment.config(tmp_path, f"data.shards={shards}", f"cache.path={store}"))
        if deaths == 1:
            assert summary.parts_written == 1 and summary.broken == ()
            return
        assert summary.parts_written == 0 and "cannot be reached" in summary.broken[0]
        assert not list((store / "parts").glob("*/part.json"))


# Identity


def test_a_shard_that_was_replaced_behind_its_url_is_found_by_its_size_or_read_through(bucket, tmp_path):
    s3: Any = fsspec.filesystem("s3")
    names = [("1.json", TURNS), ("1.png", picture(1))]
    shard, other = (write_shard(tmp_path / name / "s.tar", names) for name in "ab")
    url = f"{bucket}/replaced/s.tar"
    s3.put(str(shard), "lab/replaced/s.tar")
    expand_shards(url)
    source = shard_source(url)
    assert {k: v for k, v in source.items() if k != "version"} == {
        k: v for k, v in shard_source(str(shard)).items() if k != "modified_ns"
    }
    assert shard_change(url, source) is None and shard_change(str(shard), source) is None
    assert shard_change(url, shard_source(str(shard)), read_through=True) is None
    data = bytearray(other.read_bytes())
    data[data.index(b"What?")] ^= 1
    s3.pipe_file("lab/replaced/s.tar", bytes(data))
    expand_shards(url)
    assert shard_change(url, source) is None  # of equal size: every sample is compared when it is read
    assert shard_change(url, source, read_through=True) == "the same members with other content"
    s3.pipe_file("lab/replaced/s.tar", bytes(data) + bytes(512))
    expand_shards(url)
    assert "bytes when it was captured" in str(shard_change(url, source))


def test_a_local_shard_that_changes_while_it_is_read_is_refused(experiment, tmp_path):
    shard = shutil.copy(experiment.shard(0), tmp_path / "s.tar")
    with open_shard(shard) as opened:
        shutil.copy(experiment.shard(1), shard)
        with pytest.raises(ShardError, match="changed while it was read"):
            source_of(opened)


def test_no_command_is_run_to_look_at_shards(tmp_path, capsys):
    mark = tmp_path / "ran"
    shards = expand_shards(f"pipe:touch {mark}; cat s.tar")
    warn_of_streams(shards)
    assert shard_change(shards[0], {"bytes": 1, "members": "x"}) is None
    assert not mark.exists() and "a command gives its bytes" in capsys.readouterr().err
