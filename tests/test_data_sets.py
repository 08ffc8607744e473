"""Parquet files and folders of the `datasets` library: packed row by row, with the images that they hold."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow.ipc
import pyarrow.parquet
import pytest
from servers import hub_server
from test_packing import picture, rejects_of, samples_of

from pipeline.errors import PackError
from pipeline.packing.pack import pack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PICTURES = [picture(number) for number in range(4)]


def rows(form: str, number: int = 4) -> list[dict[str, Any]]:
    """Rows as sets of the Hub have them, with one image each."""
    turns = {
        "texts": lambda n: [{"user": f"Q{n}", "assistant": f"A{n}", "source": "s"}],
        "messages": lambda n: [
            {"role": "user", "content": [{"type": "text", "text": f"Q{n}", "index": None},
                                         {"type": "image", "text": None, "index": 0}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"A{n}", "index": None}]},
        ],
        "conversations": lambda n: [{"from": "human", "value": f"<image>\nQ{n}"}, {"from": "gpt", "value": f"A{n}"}],
    }[form]  # fmt: skip
    return [{form: turns(n), "images": [{"bytes": PICTURES[n], "path": None}], "when": datetime.date(2026, 1, n + 1)}
            for n in range(number)]  # fmt: skip


def data_set(form: str, *, with_features: bool = True) -> datasets.Dataset:
    """The rows as a data set, whose images are `Image` features or plain structs of bytes and path."""
    made = datasets.Dataset.from_list(rows(form))
    images = datasets.List(datasets.Image(decode=True))
    return made.cast_column("images", images) if with_features else made


def check(output: Path, form: str) -> None:
    found = samples_of(output)
    questions = [sample.conversations[0]["value"] for sample in found]
    place = {"texts": "<image>Q{}", "messages": "Q{}<image>", "conversations": "<image>\nQ{}"}[form]
    assert questions == [place.format(n) for n in range(4)]
    assert [sample.images for sample in found] == [(data,) for data in PICTURES]
    assert [sample.metadata["when"] for sample in found] == [f"2026-01-0{n + 1}" for n in range(4)]
    assert rejects_of(output) == []


@pytest.mark.parametrize("form", ["texts", "messages", "conversations"])
@pytest.mark.parametrize("with_features", [True, False])
def test_a_parquet_file_is_packed_in_its_order_with_its_images_unchanged(tmp_path, form, with_features):
    data_set(form, with_features=with_features).to_parquet(tmp_path / "train.parquet")
    summary = pack(tmp_path / "train.parquet", tmp_path / "out", samples_per_shard=3)
    assert (summary.packed, len(summary.shards)) == (4, 2)
    check(tmp_path / "out", form)
    assert [sample.key for sample in samples_of(tmp_path / "out")] == [f"train-{n}" for n in range(1, 5)]
    assert pack(tmp_path / "train.parquet", tmp_path / "out", samples_per_shard=3) == summary


def test_a_saved_data_set_is_packed(tmp_path):
    data_set("messages").save_to_disk(tmp_path / "saved")
    assert pack(tmp_path / "saved", tmp_path / "out").packed == 4
    check(tmp_path / "out", "messages")


def test_of_several_splits_one_is_to_be_named(tmp_path):
    for name in ("train", "validation"):
        data_set("texts").to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(PackError, match=r"hub has the splits train, validation; name one with --split"):
        pack(tmp_path / "hub", tmp_path / "out")
    with pytest.raises(PackError, match=r"has no split 'test', only train, validation; name one of these"):
        pack(tmp_path / "hub", tmp_path / "out", split="test")
    assert pack(tmp_path / "hub", tmp_path / "out", split="train").packed == 4
    check(tmp_path / "out", "texts")
    with pytest.raises(
        PackError, match=r"holds a pack of other input: annotations was .* train, now .* validation"
    ):
        pack(tmp_path / "hub", tmp_path / "out", split="validation")


def test_a_bad_row_is_listed_and_stops_nothing(tmp_path):
    bad = rows("texts")
    bad[1]["images"] = [{"bytes": PICTURES[1][:-300], "path": None}]
    bad[2]["texts"] = []
    datasets.Dataset.from_list(bad).to_parquet(tmp_path / "data.parquet")
    summary = pack(tmp_path / "data.parquet", tmp_path / "out")
    assert (summary.seen, summary.packed, summary.rejected) == (4, 2, 2)
    assert [(row["line"], row["reason"][:28]) for row in rejects_of(tmp_path / "out")] == [
        (2, "truncated or damaged image: "),
        (3, "empty conversations: 0 turn("),
    ]
    with pytest.raises(PackError, match=r"1 bad sample\(s\), first entry 2 \(id data-2\)"):
        pack(tmp_path / "data.parquet", tmp_path / "other", on_bad_sample="fail")


def test_what_is_no_data_set_is_refused_in_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PackError, match=r"data.parquet cannot be read as a data set: "):
        pack(tmp_path / "data.parquet", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        PackError, match=r"data.parquet is read by the package `datasets`; install it with `pip in"
    ):
        pack(tmp_path / "data.parquet", tmp_path / "out")


def test_a_folder_of_this_machine_asks_no_server(tmp_path, monkeypatch):
    data_set("texts").to_parquet(tmp_path / "hub" / "train.parquet")

    def refuse(*_: object) -> None:
        raise AssertionError("a server was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert pack(tmp_path / "hub", tmp_path / "out").packed == 4


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_contents_of_mixed_types_in_a_folder_are_no_json_texts(tmp_path, ending):
    """`datasets` stores a column of texts and lists as JSON, which looks like a text until it is decoded."""
    (tmp_path / "set").mkdir()
    part = [{"type": "text", "text": "Q1"}]
    lines = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
             for content in ("Q0", part)]  # fmt: skip
    written = json.dumps(lines) if ending == "json" else "\n".join(map(json.dumps, lines))
    (tmp_path / "set" / f"train.{ending}").write_text(written)
    assert pack(tmp_path / "set", tmp_path / "out").packed == 2
    found = [[turn["value"] for turn in sample.conversations] for sample in samples_of(tmp_path / "out")]
    assert found == [["Q0", "A"], ["Q1", "A"]]


PEAK = """
import datasets, pyarrow.parquet, re, sys
from pathlib import Path
from pipeline.packing.data_sets import open_data_set
peak = lambda: int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1])
before = peak()
rows = open_data_set(Path(sys.argv[1]), subset=None, split=None)[2]
print(sum(1 for row in rows() if len(row["image"]["bytes"]) == 2000), (peak() - before) >> 10)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_of_one_row_group_is_never_whole_in_memory(tmp_path, kind):
    """Both pandas and pyarrow write a million rows as one group; `datasets` read 400 MB of it with 1.5 GB."""
    path = tmp_path / f"train.{kind}"
    values = pyarrow.array([os.urandom(2000) for _ in range(100_000)])
    images = pyarrow.StructArray.from_arrays(
        [values, pyarrow.nulls(len(values), "string")], ["bytes", "path"]
    )
    table = pyarrow.table({"image": images})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=len(table))
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    command = [sys.executable, "-c", PEAK, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    number, megabytes = map(int, done.stdout.split())
    assert number == len(table)
    assert megabytes < 100


def test_a_repository_of_the_hub_is_packed_by_its_id(tmp_path):
    """In a process of its own: huggingface_hub reads its address when it is imported."""
    data_set("texts").to_parquet(tmp_path / "train.parquet")
    files = {"train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}
    with hub_server(files) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "cli.py", "pack", "lab/store", str(tmp_path / "out")]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "4 samples seen = 4 packed + 0 rejected" in done.stdout
    check(tmp_path / "out", "texts")
    assert "lab/store@0000" in (tmp_path / "out" / "pack.json").read_text()
