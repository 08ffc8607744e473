"""Damaged GGUF exports whose export.json agrees with the damage: each is one sentence, and none is called good."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from phone_models import write_phone_model, write_pictures

from pipeline.errors import ConfigError, PipelineError
from pipeline.export.gguf.folder import MMPROJ, MODEL, GGUFFolder, export_gguf
from pipeline.export.llama_cpp.verify import Found, Verification, verify_gguf
from pipeline.export.mark import MARK, digest_of_file
from pipeline.export.source import Source

pytestmark = pytest.mark.slow
SMALL = {"num_hidden_layers": 1, "tower": {"num_hidden_layers": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source.of(str(write_phone_model(tmp_path_factory.mktemp("model") / "student", **SMALL)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    export_gguf(source, folder, quant="q4_k_m", vision="f16")
    return folder


@pytest.fixture
def copy(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def damage(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change a file, and the mark so that it agrees."""
    data = bytearray((folder / name).read_bytes())
    change(data)
    (folder / name).write_bytes(data)
    mark = json.loads((folder / MARK).read_text())
    mark["files"][name] = digest_of_file(folder / name)
    (folder / MARK).write_text(json.dumps(mark))


def again(source: Source, folder: Path) -> GGUFFolder:
    return export_gguf(source, folder, quant="q4_k_m", vision="f16")


def verified(source: Source, folder: Path, pictures: Path) -> Verification:
    return verify_gguf(again(source, folder), source, pictures, question="Why?", max_new_tokens=2, threads=1)


def put(place: int, content: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[place : place + len(content)] = content

    return change


def place_of_field(file: Path, name: str) -> int:
    field = GGUFReader(file).fields[name]
    return field.offset + sum(int(part.nbytes) for part in field.parts[: field.data[0]])


@pytest.mark.parametrize(
    ("name", "field", "content"),
    [
        (MODEL, "tokenizer.ggml.eos_token_id", struct.pack("<I", 7)),
        (MODEL, "tokenizer.chat_template", b"{{ 1 }}"),
        (MODEL, "llama.context_length", struct.pack("<I", 8)),
        (MODEL, "llama.attention.layer_norm_rms_epsilon", struct.pack("<f", 0.01)),
        (MMPROJ, "clip.vision.attention.layer_norm_epsilon", struct.pack("<f", 0.001)),
    ],
)
def test_a_changed_field_is_named_though_the_files_run(name, field, content, source, copy, pictures):
    damage(copy, name, put(place_of_field(copy / name, field), content))
    with pytest.raises(
        PipelineError, match=rf"{name} is not what the export writes: field '{field}' differs"
    ):
        verified(source, copy, pictures)


def test_a_changed_shape_type_or_length_is_named(source, copy, pictures):
    name = b"output_norm.weight"
    original = (copy / MODEL).read_bytes()
    behind = original.index(name) + len(name) + 4  # the number of dimensions
    for change in (put(behind, struct.pack("<Q", 127)), put(behind + 8, struct.pack("<I", 1))):
        (copy / MODEL).write_bytes(original)
        damage(copy, MODEL, change)
        with pytest.raises(PipelineError, match=r"tensor 'output_norm.weight' differs"):
            verified(source, copy, pictures)
    (copy / MODEL).write_bytes(original)
    damage(copy, MODEL, lambda data: data.extend(bytes(999)))
    with pytest.raises(PipelineError, match="the length of the values differs"):
        verified(source, copy, pictures)


def test_a_lost_end_and_an_impossible_count_are_damage(source, copy, pictures):
    original = (copy / MODEL).read_bytes()
    for change in (
        lambda data: data.__delitem__(slice(len(data) - 4000, None)),
        put(8, struct.pack("<Q", 2**60)),
    ):
        (copy / MODEL).write_bytes(original)
        damage(copy, MODEL, change)
        with pytest.raises(PipelineError, match=r"model.gguf is damaged"):
            verified(source, copy, pictures)


def test_a_tower_is_held_to_its_own_limit_whatever_the_language_model_is_quantised_to(source, copy, pictures):
    tensor = next(t for t in GGUFReader(copy / MMPROJ).tensors if t.name == "v.blk.0.ffn_up.weight")
    larger = (np.array(tensor.data) * np.float16(1.2)).tobytes()
    damage(copy, MMPROJ, put(int(tensor.data_offset), larger))
    found = verified(source, copy, pictures)
    assert not found.passed and found.weights[1].endswith("mlp.fc2.weight") and found.weights[2] == 0.002


def test_no_number_in_one_picture_is_no_pass():
    good = Found(True, 1e-4, 1e-4, True, False, 1.0, True)
    for name in ("embeddings_error", "logits_error"):
        found = [good, replace(good, **{name: float("nan")}), good]
        assert not Verification(found, (0.0, "none", 0.1), None, "f16", "f16").passed
    assert Verification([good, good], (0.0, "none", 0.1), None, "f16", "f16").passed


@pytest.mark.parametrize(
    "change",
    [
        lambda mark: mark.pop("files"),
        lambda mark: mark.update(files="x"),
        lambda mark: mark.update(files={}),
        lambda mark: mark["files"].pop(MMPROJ),
        lambda mark: mark["files"].update({"../elsewhere": "x"}),
        lambda mark: mark.pop("bytes"),
    ],
)
def test_a_mark_that_does_not_say_all_is_damaged(change, source, copy):
    mark = json.loads((copy / MARK).read_text())
    change(mark)
    (copy / MARK).write_text(json.dumps(mark))
    with pytest.raises(PipelineError, match=r"export.json is damaged; export again with --overwrite"):
        again(source, copy)


def test_an_export_lies_as_it_was_where_another_cannot_be_read(source, copy, tmp_path):
    broken = shutil.copytree(source.folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 321}))
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    with pytest.raises(ConfigError, match=r"config.json asks for"):
        export_gguf(Source.of(str(broken)), copy, quant="f16", vision="f16", overwrite=True)
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    with pytest.raises(ConfigError, match=r"config.json asks for"):
        export_gguf(Source.of(str(broken)), tmp_path / "new", quant="f16", vision="f16")
    assert not (tmp_path / "new").exists()
