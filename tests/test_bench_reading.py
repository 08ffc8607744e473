"""The bench of reading at its quick size, ours alone: `python bench/reading.py` is the long run, beside its peers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cache import Store

BENCH = Path(__file__).parent.parent / "bench"
NUM_SAMPLES, NUM_READ, NUM_REPEATS = 48, 16, 2


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the bench prints and saves; its one peer has an environment that is ready, but fails."""
    folder = tmp_path_factory.mktemp("bench")
    peers = runpy.run_path(str(BENCH / "reading.py"))["PEERS"]
    python = folder / "lmdb" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ImportError: no such thing here' >&2\nexit 1\n")
    python.chmod(0o755)
    (folder / "lmdb" / "installed.json").write_text(json.dumps(peers["lmdb"]))
    command = [sys.executable, str(BENCH / "reading.py"), "--quick", "--peers", "lmdb"]
    places = ["--environments", str(folder), "--output", str(folder / "figures.json")]
    process = subprocess.run([*command, *places], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads((folder / "figures.json").read_text()), process.stdout


def test_every_pass_reads_every_sample_and_no_fewer_bytes_than_it_uses(bench):
    readings = bench[0]["readings"]
    assert len(readings) == NUM_REPEATS * 2 * 2 * 2  # contestants, modes, cold and warm
    for reading in readings:
        assert reading["samples"] == NUM_READ and reading["seconds"] > 0
        assert reading["asked_bytes"] >= reading["used_bytes"] > NUM_READ * 1000
    assert bench[0]["checked"]["arrays"] == NUM_SAMPLES * 8


def test_floats_are_more_bytes_than_their_codes(bench):
    delivered = {
        (r["contestant"], r["repeat"], r["mode"]): r["delivered_bytes"] for r in bench[0]["readings"]
    }
    for contestant in ("ours", "ours, windows of 32"):
        for repeat in range(NUM_REPEATS):
            codes, floats = (delivered[contestant, repeat, mode] for mode in ("codes", "float32"))
            assert codes > NUM_READ * 64 * 16 * 2  # vision alone
            assert 1.5 * codes < floats < 4 * codes


def test_a_figure_is_a_median_with_its_spread_and_ours_over_ours_is_one(bench):
    ours, windows = bench[0]["contestants"]
    assert (ours["contestant"], windows["contestant"]) == ("ours", "ours, windows of 32")
    for row in (ours, windows):
        for which in ("codes cold", "codes warm", "float32 cold", "float32 warm"):
            rate = row[which]["samples_per_second"]
            assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
    assert set(ours["codes cold"]["ours_over_it"].values()) == {1.0}
    assert windows["asked_bytes_per_sample"] < ours["asked_bytes_per_sample"]  # neighbours share chunks
    assert [bar["bar"] for bar in bench[0]["bars"]] == [
        "codes, warm: samples a second",
        "float32, warm: samples a second",
        "bytes asked for over bytes used",
        "bytes that the disk gave, cold over bytes used",
    ]


def test_a_peer_that_does_not_run_is_named_with_the_reason(bench):
    assert bench[0]["absent"] == {"lmdb": "ImportError: no such thing here"}
    assert "absent: lmdb: ImportError: no such thing here" in bench[1].splitlines()


def test_the_blobs_of_the_peers_hold_the_codes_of_the_store(tmp_path):
    sys.path.insert(0, str(BENCH))
    try:
        samples, worker = (
            runpy.run_path(str(BENCH / f"reading_{name}.py")) for name in ("samples", "worker")
        )
    finally:
        sys.path.remove(str(BENCH))
    samples["write_samples"](tmp_path, samples["SIZES"]["small"], 20)
    blobs = [load_file(file) for file in sorted((tmp_path / "samples").iterdir())]
    sums = [zlib.crc32(name.encode() + codes.tobytes()) for blob in blobs for name, codes in blob.items()]
    command = [sys.executable, str(BENCH / "reading_worker.py"), "check", "ours", str(tmp_path / "ours")]
    request = json.dumps({"indices": list(range(20))})
    process = subprocess.run([*command, request], capture_output=True, text=True)
    assert json.loads(process.stdout) == {"arrays": len(sums), "sum": sum(sums)}, process.stderr
    decoded = worker["_floats"](blobs[7], samples["VISION_STEP"])
    store = Store(tmp_path / "ours")
    read = store.read("000007", list(store.manifest.specs))
    assert read.keys() == decoded.keys()
    assert all(
        (read[name] == decoded[name]).all() and read[name].dtype == decoded[name].dtype for name in read
    )
