"""GGUF files of MobileVLM V2: what is in them, what is refused, and what a real llama.cpp computes from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from phone_models import TOKENIZER, phone_config, write_phone_model, write_pictures
from safetensors.torch import load_file, save_file

import cli
from pipeline.errors import ConfigError, PipelineError
from pipeline.export.gguf import writing
from pipeline.export.gguf.card import card, write_card
from pipeline.export.gguf.folder import GGUFFolder, export_gguf
from pipeline.export.gguf.language_model import language_model_plan
from pipeline.export.gguf.types import read_back, stored
from pipeline.export.gguf.vocabulary import CHAT_TEMPLATE
from pipeline.export.llama_cpp import defect
from pipeline.export.llama_cpp import verify as verify_module
from pipeline.export.llama_cpp.process import LlamaCpp, Settings
from pipeline.export.llama_cpp.verify import verify_gguf
from pipeline.export.mark import digest_of_file
from pipeline.export.source import Source
from pipeline.export.torch_model import TorchModel, prompt_about, relative_error
from pipeline.models.mobilevlm.processor import MobileVLMProcessor

pytestmark = pytest.mark.slow
QUESTION = "What is it?"
TYPE = GGMLQuantizationType


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_phone_model(tmp_path_factory.mktemp("phone") / "student")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> GGUFFolder:
    """Files in 16 bits. Tests must not write into the folder."""
    return export_gguf(Source.of(str(checkpoint)), tmp_path_factory.mktemp("gguf"), quant="f16", vision="f16")


def verified(folder: GGUFFolder, checkpoint: Path, pictures: Path):
    source = Source.of(str(checkpoint))
    return verify_gguf(folder, source, pictures, question=QUESTION, max_new_tokens=8, threads=1)


# What is in the files


def test_the_files_hold_every_tensor_of_the_checkpoint_and_what_was_written_is_read_back(
    exported, checkpoint
):
    tensors = load_file(checkpoint / "model.safetensors")
    back = dict(exported.tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    never_read = {name for name in tensors if "post_layernorm" in name}
    assert set(back) == set(tensors) - never_read
    for name, tensor in back.items():
        assert torch.allclose(tensor, tensors[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("type_", [TYPE.Q8_0, TYPE.Q4_K, TYPE.Q6_K, TYPE.Q5_0])
def test_a_quantised_tensor_is_near_what_it_was(type_):
    tensor = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    back = read_back(stored(tensor, type_, name="x"), type_)
    error = relative_error(back, tensor.numpy())
    assert 0 < error < {TYPE.Q8_0: 0.01, TYPE.Q6_K: 0.03, TYPE.Q5_0: 0.06, TYPE.Q4_K: 0.1}[type_]


def test_four_bits_are_chosen_as_llama_quantize_chooses_them():
    # Of 24 layers the first and last three have more bits, and of those between every third: the published tables.
    plan = {one.name: one.type for one in language_model_plan(phone_config(num_hidden_layers=24), "q4_k_m")}
    six = [n for n in range(24) if plan[f"blk.{n}.attn_v.weight"] is TYPE.Q6_K]
    assert six == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert all(plan[f"blk.{n}.ffn_down.weight"] is plan[f"blk.{n}.attn_v.weight"] for n in range(24))
    assert plan["output.weight"] is TYPE.Q6_K and plan["token_embd.weight"] is TYPE.Q4_K
    assert plan["blk.0.attn_norm.weight"] is plan["output_norm.weight"] is TYPE.F32
    tied = {
        one.name: one.type for one in language_model_plan(phone_config(tie_word_embeddings=True), "q4_k_m")
    }
    assert tied["token_embd.weight"] is TYPE.Q6_K and "output.weight" not in tied


def test_rows_that_blocks_do_not_divide_are_stored_in_the_next_best_type(checkpoint, tmp_path):
    folder = export_gguf(Source.of(str(checkpoint)), tmp_path, quant="q4_k_m", vision="q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(folder.model).tensors}
    assert types["blk.1.attn_q.weight"] is TYPE.Q5_0  # rows of 128
    assert types["output.weight"] is TYPE.Q8_0
    assert types["blk.0.ffn_down.weight"] is TYPE.Q5_0  # rows of 320
    vision = {tensor.name: tensor.tensor_type for tensor in GGUFReader(folder.mmproj).tensors}
    assert {vision[f"mm.model.{name}"] for name in ("mlp.0.weight", "mlp.2.weight")} == {TYPE.Q8_0}
    assert vision["mm.model.peg.0.weight"] is vision["v.patch_embd.weight"] is TYPE.F16
    assert vision["v.class_embd"] is vision["v.position_embd.weight"] is TYPE.F32
    assert "v.post_ln.weight" not in vision


def test_the_chat_template_writes_the_prompt_that_the_model_was_trained_on():
    turn = {"role": "user", "content": f"<image>\n{QUESTION}"}
    template = jinja2.Template(CHAT_TEMPLATE)
    assert template.render(messages=[turn], add_generation_prompt=True) == prompt_about(QUESTION)
    turns = [turn, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Why?"}]
    ours = jinja2.Template(MobileVLMProcessor.__init__.__globals__["CHAT_TEMPLATE"])
    as_parts = [{"role": t["role"], "content": t["content"]} for t in turns]
    assert template.render(messages=turns, add_generation_prompt=True) == ours.render(
        messages=as_parts, add_generation_prompt=True
    )


# In llama.cpp


def test_llama_cpp_computes_what_pytorch_does(exported, checkpoint, pictures):
    found = verified(exported, checkpoint, pictures)
    assert found.passed, str(found)
    assert "computes CLIP wrongly" in found.eyes and "20 of 20 equal" in str(found)


@pytest.mark.parametrize(
    ("quant", "vision", "changes"),
    [
        ("q8_0", "q8_0", {}),
        ("q4_k_m", "f16", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("f16", None, {"mm_projector_grid": 6}),
        (
            "f16",
            "f16",
            {"tower": {"image_size": 336, "patch_size": 14, "hidden_act": "gelu"}, "head_dim": 48},
        ),
        ("f16", "f16", {"mm_vision_select_layer": -1}),
    ],
)
def test_it_does_so_for_other_types_and_geometries(quant, vision, changes, pictures, tmp_path):
    checkpoint = write_phone_model(tmp_path / "student", seed=3, **changes)
    folder = export_gguf(Source.of(str(checkpoint)), tmp_path / "gguf", quant=quant, vision=vision)
    found = verified(folder, checkpoint, pictures)
    assert found.passed, str(found)
    assert (found.eyes is None) == (vision is None)


def test_queries_and_keys_in_another_order_are_found_out(checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "permuted", lambda tensor, heads: tensor)
    folder = export_gguf(Source.of(str(checkpoint)), tmp_path, quant="f16", vision="f16")
    found = verified(folder, checkpoint, pictures)
    assert not found.passed and "DIFFERS" in str(found) and "_proj" in found.weights[1]


def test_trained_vision_weights_reach_the_file(checkpoint, exported, pictures, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(n for n in tensors if "encoder.layers.1.mlp.fc1.weight" in n)
    tensors[name] = tensors[name] + 0.5 * torch.randn(tensors[name].shape)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    folder = export_gguf(Source.of(str(other)), tmp_path / "gguf", quant="f16", vision="f16")
    assert verified(folder, other, pictures).passed
    assert folder.files["model.gguf"] != exported.files["model.gguf"]  # it names the source's digest
    square = np.full((96, 96, 3), 90, np.uint8)
    answers = []
    for one in (exported, folder):
        with LlamaCpp(Settings(one.model, one.mmproj, class_token_width=64)) as runtime:
            answers.append(runtime.answer(prompt_about(QUESTION), image=square, max_new_tokens=8))
    assert relative_error(answers[0].embeddings, answers[1].embeddings) > 0.05
    assert relative_error(answers[0].logits[-1], answers[1].logits[-1]) > 0.01


def test_a_build_that_computes_clip_rightly_is_called_right(exported, checkpoint, pictures, monkeypatch):
    def mended(settings: Settings) -> LlamaCpp:
        return LlamaCpp(dataclasses.replace(settings, class_token_width=64))

    monkeypatch.setattr(defect, "LlamaCpp", mended)
    monkeypatch.setattr(verify_module, "LlamaCpp", mended)
    found = verified(exported, checkpoint, pictures)
    assert found.passed and "no workaround is needed" in found.eyes


def test_a_tower_that_is_wrong_in_another_way_is_no_known_defect(exported, checkpoint, pictures, tmp_path):
    other = write_phone_model(tmp_path / "other", seed=9)
    shutil.copy(other / "model.safetensors", tmp_path / "weights")
    folder = export_gguf(Source.of(str(other)), tmp_path / "gguf", quant="f16", vision="f16")
    swapped = dataclasses.replace(exported, path=tmp_path / "mixed", files={})
    swapped.path.mkdir()
    shutil.copy(exported.model, swapped.model)
    shutil.copy(exported.mmproj, swapped.path / "mmproj.gguf")

    class Elsewhere(GGUFFolder):
        def tensors(self, shapes):
            yield from folder.tensors(shapes)

    lying = Elsewhere(**{f.name: getattr(swapped, f.name) for f in dataclasses.fields(swapped)})
    with pytest.raises(PipelineError, match="not by the known defect"):
        verified(lying, checkpoint, pictures)


def test_the_server_answers_the_prompt_of_the_chat_template_with_the_known_defect(
    exported, checkpoint, tmp_path
):
    """The supported interface: an image in a request, the file's own template, and stock llama.cpp's embeddings."""
    from pipeline.export.llama_cpp.defect import defective_embeddings
    from pipeline.export.pictures import Pictures

    picture = next((write_pictures(tmp_path / "one", number=1)).iterdir())
    pictures = Pictures(picture.parent, Source.of(str(checkpoint)), fewest=1)
    [(square, pixels)] = list(pictures)
    from PIL import Image

    Image.fromarray(square).save(tmp_path / "square.png")
    script = Path(__file__).parent / "llama_server.py"
    command = [sys.executable, str(script), str(exported.path), str(tmp_path / "square.png"), f"\n{QUESTION}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr[-2000:]
    tokens = json.loads(made.stdout.splitlines()[-1])
    model = TorchModel(Source.of(str(checkpoint)), QUESTION, max_new_tokens=1)
    embeddings = defective_embeddings(model.network, pixels[None])[0].numpy()
    logits, _ = model.judged([0], embeddings)
    expected = torch.log_softmax(torch.from_numpy(logits[-1]), dim=0)
    for token in tokens:
        assert token["logprob"] == pytest.approx(float(expected[token["id"]]), abs=0.05)
    assert tokens[0]["id"] == int(expected.argmax()) and len(tokens) == 5


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tower": {"image_size": 64, "patch_size": 8}},
            "an image of 64 in patches of 8, llama.cpp takes 24 x 24",
        ),
        ({"tower": {"image_size": 100, "patch_size": 4}}, "an image of 100 in patches of 4"),
        ({"mm_projector_grid": 8}, "mm_projector_grid is 8, llama.cpp takes 12"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is cls_patch"),
        ({"mm_vision_select_layer": 0}, "mm_vision_select_layer is 0"),
        ({"tower": {"hidden_act": "relu"}}, "hidden_act is relu, llama.cpp takes gelu or quick_gelu"),
        ({"attention_bias": True}, "attention_bias is True, llama.cpp takes false"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu, llama.cpp takes silu"),
    ],
)
def test_a_geometry_on_which_the_runtime_would_abort_is_refused_in_one_sentence(changes, words, tmp_path):
    checkpoint = write_phone_model(tmp_path / "student", **changes)
    with pytest.raises(ConfigError, match=words):
        export_gguf(Source.of(str(checkpoint)), tmp_path / "gguf", quant="f16", vision="f16")
    assert not (tmp_path / "gguf").exists()


def test_another_family_and_a_missing_tokenizer_are_refused(family_folder, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="is of the family 'llava'"):
        export_gguf(Source.of(str(family_folder("llava"))), tmp_path, quant="f16", vision="f16")
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.model"):
        export_gguf(Source.of(str(bare)), tmp_path / "gguf", quant="f16", vision=None)


def test_a_tokenizer_with_more_pieces_than_the_model_has_rows_is_refused(tmp_path):
    small = write_phone_model(tmp_path / "small", vocab_size=300)
    with pytest.raises(ConfigError, match="has 512 pieces, but the model's vocab_size is 300"):
        export_gguf(Source.of(str(small)), tmp_path / "gguf", quant="f16", vision=None)


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "not finite"), (1e6, "beyond the largest number")]
)
def test_weights_that_no_type_can_hold_are_named(value, words, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"'lm_head.weight'.*{words}"):
        export_gguf(Source.of(str(broken)), tmp_path / "gguf", quant="f16", vision=None)
    assert not list((tmp_path / "gguf").glob("*.gguf*"))


def test_too_few_pictures_prove_too_little(exported, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="3 images, at least 20 are needed"):
        verified(exported, checkpoint, write_pictures(tmp_path, number=3))


# Files that lie there


def test_an_export_is_kept_and_another_is_not_replaced_unless_asked(exported, checkpoint, tmp_path, capsys):
    source, folder = Source.of(str(checkpoint)), tmp_path / "gguf"
    shutil.copytree(exported.path, folder)
    before = (folder / "model.gguf").stat().st_mtime_ns
    export_gguf(source, folder, quant="f16", vision="f16")
    assert (
        "nothing was done" in capsys.readouterr().out and (folder / "model.gguf").stat().st_mtime_ns == before
    )
    with pytest.raises(ConfigError, match=r"holds another export \(quant f16\)"):
        export_gguf(source, folder, quant="q8_0", vision="f16")
    assert export_gguf(source, folder, quant="q8_0", vision="f16", overwrite=True).quant == "q8_0"


def test_a_file_that_was_changed_is_named_before_it_is_run(exported, checkpoint, pictures, tmp_path):
    folder = dataclasses.replace(exported, path=shutil.copytree(exported.path, tmp_path / "gguf"))
    data = bytearray(folder.model.read_bytes())
    data[len(data) // 2] ^= 0x10
    folder.model.write_bytes(data)
    with pytest.raises(PipelineError, match=r"model.gguf is not as it was written"):
        verified(folder, checkpoint, pictures)
    with pytest.raises(PipelineError, match=r"model.gguf is not as it was written"):
        export_gguf(Source.of(str(checkpoint)), folder.path, quant="f16", vision="f16")


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_file_that_llama_cpp_cannot_read_is_one_sentence(damage, exported, tmp_path):
    data = exported.model.read_bytes()
    file = tmp_path / "model.gguf"
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:4] + b"\xff" * 8 + data[12:])
    with pytest.raises(PipelineError, match=r"llama.cpp cannot open .*model.gguf"), LlamaCpp(Settings(file)):
        pass


def test_an_assertion_of_llama_cpp_ends_its_process_and_is_one_sentence(exported):
    with pytest.raises(PipelineError, match=r"llama.cpp ended with code -6; its last words: .*ASSERT"):  # noqa: SIM117
        with LlamaCpp(Settings(exported.model, context=64)) as runtime:
            runtime.answer("word " * 200)


# The command and the card


def test_the_command_writes_verifies_and_exits_1_where_something_differs(
    checkpoint, pictures, tmp_path, capsys, monkeypatch
):
    arguments = [
        "export",
        "gguf",
        str(checkpoint),
        str(tmp_path / "gguf"),
        "--quant",
        "f16",
        "--license",
        "mit",
    ]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--verify", str(pictures)])
    assert "greedy answers" in capsys.readouterr().out
    text = (tmp_path / "gguf" / "README.md").read_text()
    assert "license: mit" in text and "20 of 20 equal" in text and "#25814" in text
    monkeypatch.setitem(verify_module.LOGITS_LIMIT, "f16", 1e-9)
    with pytest.raises(SystemExit, match="1"):
        cli.main([*arguments, "--verify", str(pictures)])
    assert "DIFFERS" in capsys.readouterr().out


def test_the_card_names_the_files_the_prompt_and_the_commands(exported, checkpoint):
    source = Source.of(str(checkpoint))
    text = card(exported, source, verified=None)
    for name in ("model.gguf", "mmproj.gguf"):
        assert digest_of_file(exported.path / name) in text
    assert prompt_about("What is in the picture?").replace("<image>", "<__media__>") in text
    for program in ("llama-mtmd-cli", "llama-server", "Android", "iOS"):
        assert program in text
    assert "Not verified yet" in text and source.digest in text
    alone = dataclasses.replace(exported, vision=None, files={"model.gguf": exported.files["model.gguf"]})
    assert "144 rows of 128 floats" in card(alone, source, verified=None)


def test_a_card_keeps_its_verification_until_there_is_another(exported, checkpoint, tmp_path):
    folder = dataclasses.replace(exported, path=shutil.copytree(exported.path, tmp_path / "gguf"))
    source = Source.of(str(checkpoint))
    write_card(folder, source, verified="the table")
    assert "the table" in write_card(folder, source, verified=None).read_text()


def test_the_folder_of_a_training_is_taken_for_its_model_and_its_provenance_is_told(checkpoint, tmp_path):
    training = tmp_path / "distilled"
    shutil.copytree(checkpoint, training / "model")
    config = {
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "data": {"shards": "a-{0..3}.tar"},
        "losses": {"supervised": {"weight": 1}, "attention": None},
    }
    (training / "provenance.json").write_text(json.dumps({"config": config}))
    source = Source.of(str(training))
    folder = export_gguf(source, tmp_path / "gguf", quant="f16", vision="f16")
    text = card(folder, source, verified=None)
    assert source.name == "distilled"
    for words in (
        "**Teacher**: `big`",
        "**Trained from**: `small`",
        "`a-{0..3}.tar`",
        "**Losses**: `supervised`\n",
    ):
        assert words in text
    shutil.rmtree(training / "model")
    with pytest.raises(ConfigError, match="a training that wrote no model yet"):
        Source.of(str(training))


def test_the_tokenizer_of_the_file_reads_text_as_ours_does(exported, checkpoint):
    processor = MobileVLMProcessor.from_pretrained(checkpoint)
    assert TOKENIZER.is_file()
    from pipeline.models.mobilevlm.tokenizer import PROBES

    with LlamaCpp(Settings(exported.model)) as runtime:
        for text in PROBES:
            assert runtime.answer(text).prompt_ids == processor.ids_of(text), text
