"""Students cut from a teacher of every family: what is kept equals the teacher's, and every stage takes them."""

from __future__ import annotations

import pytest
import tiny_families
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.conformance.report import check_model
from pipeline.conformance.specimen import specimen_of
from pipeline.errors import ConfigError
from pipeline.models.cut import make_student, parse_layers
from pipeline.models.loading import load_network

pytestmark = pytest.mark.slow
FAMILIES = [
    family for family in tiny_families.FAMILIES if family != "lfm2_vl"
]  # its processor needs torchvision


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_first_layers_are_the_teachers(family, family_folder, tmp_path):
    teacher = family_folder(family)
    made = make_student(str(teacher), tmp_path / "student", layers=[0, 1])
    ours, theirs = (
        load_network(str(folder), dtype=torch.float32) for folder in (tmp_path / "student", teacher)
    )
    assert (
        made.student_parameters == ours.num_parameters() < theirs.num_parameters() == made.teacher_parameters
    )
    assert made.fresh == ()
    whole = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_layers_and_half_the_width_are_a_model_that_passes_the_suite(family, family_folder, tmp_path):
    teacher = family_folder(family)
    make_student(str(teacher), tmp_path / "student", layers=[2, 1], width=16)
    lines = list(check_model(str(tmp_path / "student")))
    assert [line.text for line in lines if not line.passed] == []
    specimen = specimen_of(tmp_path / "student")
    assert specimen.vlm.text_config.hidden_size == 16
    assert specimen.features().flat.shape[1] == 16


def language_model(folder, **fields) -> str:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(LlamaConfig(**fields)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("family", "width"), [("llava", 32), ("llava", 16), ("mobilevlm", 16)])
def test_a_pretrained_language_model_takes_the_teachers_place(family, width, family_folder, tmp_path):
    teacher = load_network(str(family_folder(family)), dtype=torch.float32)
    text = teacher.config.get_text_config()
    shape = {"vocab_size": text.vocab_size, "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    name = language_model(tmp_path / "language", **shape)
    made = make_student(str(family_folder(family)), tmp_path / "student", language_model=name)
    student = load_network(str(tmp_path / "student"), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(name)
    for part in ("layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight"):
        assert torch.equal(student.get_decoder().state_dict()[part], theirs.get_decoder().state_dict()[part])
    assert torch.equal(student.get_output_embeddings().weight, theirs.lm_head.weight)
    assert all("projector" in name for name in made.fresh) and bool(made.fresh) == (width != text.hidden_size)
    tower = student.get_encoder(modality="image").state_dict()
    for key, tensor in teacher.get_encoder(modality="image").state_dict().items():
        assert torch.equal(tower[key], tensor), key
    assert [line.text for line in check_model(str(tmp_path / "student")) if not line.passed] == []


def test_what_does_not_go_together_is_refused(family_folder, tmp_path):
    teacher = str(family_folder("llava"))
    with pytest.raises(
        ConfigError, match=r"layers: 0, 4 asked for, the language model has 0 to 3; name each layer"
    ):
        make_student(teacher, tmp_path / "a", layers=[0, 4])
    with pytest.raises(
        ConfigError, match=r"width: 20 asked for, .*32 with 2 heads of keys; possible are 16, 32"
    ):
        make_student(teacher, tmp_path / "a", width=20)
    name = language_model(tmp_path / "language", vocab_size=99, hidden_size=16, intermediate_size=8,
                          num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    with pytest.raises(ConfigError, match=r"vocab_size 99, the teacher's is \d+; name one of its own kind"):
        make_student(teacher, tmp_path / "a", language_model=name)
    with pytest.raises(ConfigError, match=r"model_type 'llama', the teacher's is 'qwen3_vl'"):
        make_student(str(family_folder("qwen3_vl")), tmp_path / "a", language_model=name)
    with pytest.raises(ConfigError, match="already holds files; name a new folder"):
        make_student(teacher, tmp_path / "language")


def test_layers_are_written_as_numbers_and_ranges():
    assert parse_layers("0, 2,4-6") == [0, 2, 4, 5, 6]
    for text in ("", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ConfigError, match="layers: expected numbers such as 0,1,4-7, found"):
            parse_layers(text)
