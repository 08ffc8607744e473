"""Web servers that fail now and then, or keep back what others say; and that nothing else is asked."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from servers import Static, StaticWithRanges, static_server
from small_experiment import picture, write_shard

from cache import Mirror, Span
from pipeline.data.remote_shards import about
from pipeline.data.shard_files import open_shard
from pipeline.data.shards import Sample, read_shard
from pipeline.data.spans import SpanReader, without_ranges
from pipeline.distill.parts import open_dataset

TURNS = b'{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A."}]}'


@pytest.fixture
def shard(tmp_path) -> Path:
    members = [
        (f"{n}.{kind}", data) for n in range(9) for kind, data in (("json", TURNS), ("png", picture(n)))
    ]
    return write_shard(tmp_path / "served" / "s.tar", members)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch):
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


class WithoutLength(Static):
    """Says neither how long a file is nor of which version; its end is that of the connection."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in ("Content-Length", "Last-Modified"):
            super().send_header(keyword, value)


class WithRangesAlone(StaticWithRanges):
    """Sends ranges, and does not say of which version."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


class Compressing(WithoutLength):
    """Calls a .tar.gz a tar that is compressed for the transfer, as Apache may."""

    def end_headers(self) -> None:
        self.send_header("Content-Encoding", "gzip")
        super().end_headers()


@pytest.mark.parametrize(("handler", "name"), [(WithoutLength, "s.tar"), (Compressing, "s.tar.gz")])
def test_a_server_that_does_not_say_how_long_a_file_is_gives_it_whole(shard, impatient, handler, name):
    shard.with_name("s.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with static_server(shard.parent, handler) as (url, _):
        samples = [item for item in read_shard(f"{url}/{name}") if isinstance(item, Sample)]
    assert [one.images for one in samples] == [(picture(n),) for n in range(9)]


class Overloaded(StaticWithRanges):
    """Refuses every place once with 429."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        asked: Counter[str] = vars(self.server).setdefault("asked", Counter())
        place = str(self.headers.get("Range"))
        asked[place] += 1
        return self.send_error(429) if asked[place] == 1 else super().do_GET()


def test_a_server_that_is_overloaded_sends_ranges_all_the_same(shard, impatient):
    with static_server(shard.parent, Overloaded) as (url, _):
        assert without_ranges([f"{url}/s.tar"]) == {}


class Losing(StaticWithRanges):
    """Fails with one place of five, each time with others."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        place = self.headers.get("Range")
        if place:
            number = vars(self.server)["number"] = vars(self.server).get("number", -1) + 1
            if number % 5 == 0:
                return self.send_error(503)
        return super().do_GET()


def test_of_a_batch_only_what_failed_is_asked_for_again(tmp_path, impatient):
    (tmp_path / "s.tar").write_bytes(data := os.urandom(1 << 20))
    places = [Span("x", start, 10) for start in range(0, 1 << 20, 1 << 14)]
    with static_server(tmp_path, Losing) as (url, requests):
        read = SpanReader().holding((f"{url}/s.tar", place) for place in places)
        assert all(read(f"{url}/s.tar", p) == data[p.offset : p.offset + p.size] for p in places)
        assert len(places) < len(requests) < 1.5 * len(places)


@pytest.mark.parametrize("handler", [WithRangesAlone, StaticWithRanges])
def test_the_mirror_gives_nothing_of_a_file_that_was_replaced(tmp_path, handler):
    file, place = tmp_path / "s.tar", Span("x", 2, 3)
    with static_server(tmp_path, handler) as (url, _):
        for number, text in enumerate((b"0123456789", b"abcdefghij")):
            file.write_bytes(text)
            os.utime(file, (number, number))
            read = SpanReader(Mirror(tmp_path / "mirror", 1000))
            about(f"{url}/s.tar", again=True)
            assert read(f"{url}/s.tar", place) == text[2:5]


def test_a_training_asks_once_for_each_shard(experiment, tmp_path):
    with static_server(experiment.shards) as (url, requests):
        shards = f"{url}/shard-{{000000..000002}}.tar"
        open_dataset(experiment.config(tmp_path, f"data.shards={shards}"))
        assert sorted(path for path, place in requests if not place) == [
            f"/shard-00000{n}.tar" for n in range(3)
        ]


def test_a_command_is_ended_when_nobody_reads_on(shard):
    started = time.monotonic()
    with open_shard(f"pipe:cat {shard}; head -c 3000000 /dev/zero; sleep 20") as opened:
        assert len(opened.read_at(0, 512)) == 512
    assert time.monotonic() - started < 5


class Restarting(StaticWithRanges):
    """Is away for six requests after the first."""

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        number = vars(self.server)["number"] = vars(self.server).get("number", 0) + 1
        return self.send_error(503) if 1 < number < 8 else super().do_GET()


def test_a_server_that_has_answered_is_waited_for(tmp_path, impatient):
    (tmp_path / "s.tar").write_bytes(b"0123456789")
    with static_server(tmp_path, Restarting) as (url, requests):
        assert [SpanReader()(f"{url}/s.tar", Span("x", n, 2)) for n in (0, 4)] == [b"01", b"45"]
        assert len(requests) == 8


@pytest.mark.parametrize("package", ["cache", "pipeline", "cli"])
def test_the_client_of_the_hub_is_told_to_report_nothing(package):
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    code = (
        f"import {package}; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == "True", said.stderr
