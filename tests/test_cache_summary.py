"""Info adds up what a store holds."""

from __future__ import annotations

import json
from pathlib import Path

from small_store import fill_part, manifest, write_store

from cache import StoreWriter, summarise


def test_info_adds_up_what_the_store_holds(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    writer = StoreWriter.open(store, manifest("shard-000002"))
    summary = summarise(store)
    assert writer.manifest.planned_parts[-1] == "shard-000002"
    assert (summary.parts_done, summary.parts_planned) == (2, 3)
    assert (summary.samples, summary.rejected) == (6, 2)
    assert summary.rejects_by_reason == {"not an image": 2}
    assert (summary.distinct_images, summary.image_references, summary.dedupe_factor) == (4, 6, 1.5)
    assert summary.teacher == {"name": "tiny", "num_heads": 2} and summary.provenance == {"command": "test"}
    assert summary.fingerprint["tokenizer"] == "70" and summary.capture == {"attention": {"layers": [0]}}
    arrays = {array.name: array for array in summary.arrays}
    assert (
        arrays["hidden"].rows == 26
        and arrays["vision"].rows == 4
        and arrays["hidden"].stated_error == "exact"
    )
    assert arrays["vision"].stated_error == "|error| <= 0.00390625 (step 0.0078125 / 2)"
    assert sum(array.bytes for array in summary.arrays) < summary.bytes
    assert arrays["hidden"].bytes_per_sample == arrays["hidden"].bytes / 6
    assert summary.bytes_per_sample == summary.bytes / 6
    assert json.loads(json.dumps(summary.to_json()))["samples"] == 6


def test_info_of_an_empty_store_divides_by_nothing(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, manifest("p"))
    summary = summarise(tmp_path)
    assert (summary.samples, summary.dedupe_factor, summary.parts_done) == (0, 1.0, 0)
    with writer.part("p", source={}) as part:
        fill_part(part, "a")
        part.commit()
    assert summarise(tmp_path).parts_done == 1


def test_the_time_that_a_store_took_is_told_only_if_every_part_says_it(tmp_path: Path) -> None:
    writer = StoreWriter.open(tmp_path, manifest("p", "q", "r"))
    for name, seconds in (("p", 1.5), ("q", 2.25)):
        with writer.part(name, source={}) as part:
            fill_part(part, name)
            part.commit(seconds=seconds)
    assert summarise(tmp_path).teacher_seconds == 3.75
    with writer.part("r", source={}) as part:
        fill_part(part, "r")
        part.commit()
    assert summarise(tmp_path).teacher_seconds is None
