"""A twig in transformers' own `generate`, its folder, and the base that it belongs to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from transformers import StoppingCriteria
from twig_models import FAMILIES, TwigSpecimen, twig_specimen

from pipeline.errors import ConfigError
from pipeline.models.loading import load_network
from pipeline.twig.base import Base
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.decoding.custom_generate import TwigGenerate, generate_with_twig
from pipeline.twig.decoding.tree import Tree
from pipeline.twig.folder import load_twig, save_twig
from pipeline.twig.geometry import Geometry

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(attach_layer=1, num_layers=2, wipe_layer=5, num_base_layers=6)


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    return twig_specimen("llava", tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture(scope="module")
def twig_folder(specimen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "twig"
    twig = specimen.twig(GEOMETRY)
    save_twig(folder, twig.state_dict(), GEOMETRY, BaseIdentity.of_checkpoint(str(specimen.folder)))
    return folder


def inputs_of(specimen: TwigSpecimen, *numbers: int) -> dict[str, Any]:
    """What a processor returns: ids, masks, types of tokens, and pixels in place of features."""
    prompts = specimen.prompts(list(numbers))
    pixels = [image for n in numbers for image in specimen.specimen.images[n]]
    of_text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    kept = {name: prompts.inputs[name] for name in of_text if name in prompts.inputs}
    return kept | (specimen.specimen.vlm.joined(pixels) if pixels else {})


def stop_of(specimen: TwigSpecimen) -> int:
    return specimen.specimen.vlm.image_token_id


@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 3), (0, 1, 2)])
def test_generate_returns_what_the_base_does(specimen, twig_folder, numbers):
    network, inputs = specimen.base.network, inputs_of(specimen, *numbers)
    twig = load_twig(twig_folder, network)
    asked = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": stop_of(specimen), "pad_token_id": 0}
    expected = network.generate(**inputs, **asked)
    assert (
        network.generate(**inputs, **asked, custom_generate=TwigGenerate(twig)).tolist() == expected.tolist()
    )


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("llava", "smolvlm", "idefics3")]
)
def test_generate_returns_what_the_base_of_another_family_does(family, tmp_path):
    """Among them Qwen, whose positions `generate` computes from grids that it then leaves out."""
    specimen = twig_specimen(family, tmp_path / "base")
    network, twig = specimen.base.network, specimen.twig(GEOMETRY, seed=2)
    for numbers in [(0,), (specimen.num_prompts - 1,), (0, 1)]:
        inputs = inputs_of(specimen, *numbers)
        asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = network.generate(**inputs, **asked)
        made = network.generate(**inputs, **asked, custom_generate=TwigGenerate(twig))
        assert made.tolist() == expected.tolist(), numbers


def test_generate_drafts_trees(specimen, twig_folder):
    network, inputs = specimen.base.network, inputs_of(specimen, 0, 3)
    twig = load_twig(twig_folder, network)
    asked = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": stop_of(specimen), "pad_token_id": 0}
    expected = network.generate(**inputs, **asked)
    made = network.generate(**inputs, **asked, custom_generate=TwigGenerate(twig, tree=Tree()))
    assert made.tolist() == expected.tolist()
    tree = generate_with_twig(network, twig, inputs, max_new_tokens=10, stop_ids=(), tree=Tree(nodes=7))
    assert all(drafted > 0 and drafted % 7 == 0 for drafted in tree.drafted)


def test_generate_prunes(specimen, twig_folder):
    network, inputs = specimen.base.network, inputs_of(specimen, 0)
    twig = load_twig(twig_folder, network)
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop_of(specimen)}
    ids = network.generate(**inputs, **asked, custom_generate=TwigGenerate(twig, keep=0.5))
    answers = generate_with_twig(
        network, twig, inputs, max_new_tokens=12, stop_ids=[stop_of(specimen)], keep=0.5
    )
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == answers.tokens[0]


def test_generate_samples(specimen, twig_folder):
    network, inputs = specimen.base.network, inputs_of(specimen, 3)
    twig = load_twig(twig_folder, network)
    texts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        made = network.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=True,
            temperature=5.0,
            top_k=4,
            custom_generate=TwigGenerate(twig),
        )
        texts.add(tuple(made[0].tolist()))
    assert len(texts) > 3


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "which a twig cannot do: it changes scores by the scores alone"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"stopping_criteria": [Never()]}, "Never"),
    ],
)
def test_what_a_twig_cannot_do_is_refused(specimen, twig_folder, asked, complaint):
    network = specimen.base.network
    twig = load_twig(twig_folder, network)
    with pytest.raises(ConfigError, match=complaint):
        network.generate(
            **inputs_of(specimen, 3), max_new_tokens=4, custom_generate=TwigGenerate(twig), **asked
        )


def test_prompts_that_do_not_end_where_the_answer_begins_are_refused(specimen):
    twig, inputs = specimen.twig(GEOMETRY), inputs_of(specimen, 3)
    padded = {name: torch.nn.functional.pad(tensor, (0, 2)) for name, tensor in inputs.items()}
    with pytest.raises(
        ConfigError, match=r"padded on the right, .* set the tokenizer's padding_side to left"
    ):
        generate_with_twig(specimen.base.network, twig, padded, max_new_tokens=2)
    embeds = {"inputs_embeds": specimen.base.embeddings(inputs["input_ids"])}
    with pytest.raises(ConfigError, match="pass prompts as ids, without inputs_embeds"):
        specimen.base.network.generate(**embeds, max_new_tokens=2, custom_generate=TwigGenerate(twig))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"keep": "1/9"}, "keep: expected a share above 0 and at most 1, or null, found '1/9'"),
        ({"keep": float("nan")}, "keep: expected a share .* found nan"),
        ({"delta": "all"}, "delta: expected auto, or a number from 0 on, found 'all'"),
        ({"delta": 2.5}, "delta: expected auto, or a number from 0 on, found 2.5"),
        ({"look_up": -1}, "look_up: expected a number from 0 on, found -1"),
        ({"threshold": "high"}, "threshold: expected a probability, found 'high'"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a number from 1 on, found 0"),
    ],
)
def test_settings_of_another_type_are_refused(specimen, settings, complaint):
    asked = {"max_new_tokens": 2} | settings
    with pytest.raises(ConfigError, match=complaint):
        generate_with_twig(specimen.base.network, specimen.twig(GEOMETRY), inputs_of(specimen, 3), **asked)


def test_a_twig_that_does_not_fit_the_model_is_refused(specimen):
    longer = specimen.twig(replace(GEOMETRY, num_base_layers=7))
    with pytest.raises(ConfigError, match="belongs to a base of 7 layers, this model has 6"):
        generate_with_twig(specimen.base.network, longer, inputs_of(specimen, 3), max_new_tokens=2)
    half = specimen.twig(GEOMETRY).to(torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"bfloat16 on cpu, its base torch.float32 on cpu; load the twig again"
    ):
        generate_with_twig(specimen.base.network, half, inputs_of(specimen, 3), max_new_tokens=2)


def test_end_tokens_are_the_models_own_unless_others_are_named(specimen):
    network, inputs, twig = specimen.base.network, inputs_of(specimen, 3), specimen.twig(GEOMETRY)
    text = generate_with_twig(network, twig, inputs, max_new_tokens=8, stop_ids=()).tokens[0]
    own = network.generation_config.eos_token_id
    assert own not in text[:-1]
    network.generation_config.eos_token_id = text[2]
    try:
        answers = generate_with_twig(network, twig, inputs, max_new_tokens=8)
    finally:
        network.generation_config.eos_token_id = own
    assert answers.tokens[0] == text[: text.index(text[2]) + 1]


def test_short_answers_are_padded_as_transformers_does(specimen):
    """With the first of the end tokens, where no padding is named."""
    network, inputs, twig = specimen.base.network, inputs_of(specimen, 0, 3), specimen.twig(GEOMETRY)
    texts = generate_with_twig(network, twig, inputs, max_new_tokens=8, stop_ids=()).tokens
    [early] = [token for token in texts[1][:1] if token not in texts[0]]
    for ends in ([early, 2], [2, early]):
        asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends}
        pad, network.generation_config.pad_token_id = network.generation_config.pad_token_id, None
        try:
            expected = network.generate(**inputs, **asked)
            made = network.generate(**inputs, **asked, custom_generate=TwigGenerate(twig))
        finally:
            network.generation_config.pad_token_id = pad
        assert made.tolist() == expected.tolist() and made[1, -1] == ends[0]


# The folder


def test_a_folder_gives_the_same_twig(specimen, twig_folder):
    twig, again = specimen.twig(GEOMETRY), load_twig(twig_folder, specimen.base.network)
    assert again.geometry == GEOMETRY
    for name, tensor in twig.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_another_base_is_refused(specimen, twig_folder, tmp_path):
    other = twig_specimen("llava", tmp_path / "other", seed=9)
    with pytest.raises(
        ConfigError, match=r"belongs to the base .* which differs in embeddings, head, layer 0 and others"
    ):
        load_twig(twig_folder, other.base.network)
    smaller = twig_specimen("llava", tmp_path / "smaller", num_layers=5)
    with pytest.raises(ConfigError, match="num_layers 6, but this model has 5"):
        load_twig(twig_folder, smaller.base.network)
    family = twig_specimen("internvl", tmp_path / "internvl")
    with pytest.raises(ConfigError, match="family llava, but this model has internvl"):
        load_twig(twig_folder, family.base.network)


def test_a_base_whose_weights_changed_in_memory_is_refused(specimen, twig_folder):
    network = load_network(str(specimen.folder), dtype=torch.float32).eval()
    with torch.no_grad():
        network.get_decoder().layers[4].mlp.up_proj.weight[0, 0] += 0.5
    with pytest.raises(ConfigError, match="differs in layer 4"):
        load_twig(twig_folder, network)


def test_a_base_in_another_dtype_is_compared_by_its_checkpoint(specimen, twig_folder, tmp_path):
    network = load_network(str(specimen.folder), dtype=torch.bfloat16).eval()
    assert load_twig(twig_folder, network).head.weight.dtype == torch.bfloat16
    other = twig_specimen("llava", tmp_path / "other", seed=9)
    network = load_network(str(other.folder), dtype=torch.bfloat16).eval()
    with pytest.raises(ConfigError, match="which differs in"):
        load_twig(twig_folder, network)


def test_broken_folders_are_refused_in_one_sentence(specimen, twig_folder, tmp_path):
    network = specimen.base.network
    with pytest.raises(ConfigError, match=r"no config.json; name a folder that `alignkd twig train` wrote"):
        load_twig(tmp_path, network)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ConfigError, match="'alignkd_twig' of format 1 was asked for, found 'llava'"):
        load_twig(tmp_path, network)
    (tmp_path / "config.json").write_text((twig_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no twig.safetensors"):
        load_twig(tmp_path, network)
    (tmp_path / "twig.safetensors").write_bytes((twig_folder / "twig.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"twig.safetensors"):
        load_twig(tmp_path, network)
    fields = json.loads((twig_folder / "config.json").read_text()) | {"num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "twig.safetensors").write_bytes((twig_folder / "twig.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="its tensors are not those of a twig of this base"):
        load_twig(tmp_path, network)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attach_layer": 2}, "attach_layer is 2, but twig.safetensors was trained on layer 1"),
        ({"attach_layer": True}, "a whole number of layers was expected, found True"),
        ({"num_layers": 2.0}, "a whole number of layers was expected, found 2.0"),
        ({"wipe_layer": "5"}, "a whole number of layers was expected, found '5'"),
        ({"wipe_layer": 9}, r"config.json: twig: wipe_layer \(Kf\) 9 asked for"),
        ({"base": {"digests": {}}}, "its digests are not those that its digest was made of"),
        ({"base": {"digests": None}}, "its digests are not those that its digest was made of"),
        ({"base": {"digest": "0"}}, "its digests are not those that its digest was made of"),
        ({"base": {"num_layers": "6"}}, "a whole number of layers was expected, found '6'"),
    ],
)
def test_an_edited_config_is_refused(specimen, twig_folder, tmp_path, changes, complaint):
    folder = copied_twig(twig_folder, tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    base = fields["base"] | changes.get("base", {})
    (folder / "config.json").write_text(json.dumps(fields | changes | {"base": base}))
    with pytest.raises(ConfigError, match=complaint) as error:
        load_twig(folder, specimen.base.network)
    assert "config.json" in str(error.value) and len(str(error.value).splitlines()) == 1


def copied_twig(folder: Path, elsewhere: Path) -> Path:
    return Path(shutil.copytree(folder, elsewhere / "twig"))


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([1, 10**6]),
        torch.tensor([-1]),
        torch.tensor([1.5]),
        torch.tensor([[1]]),
        torch.ones(0).long(),
    ],
)
def test_ids_of_drafts_outside_the_vocabulary_are_refused(specimen, twig_folder, tmp_path, ids):
    folder = copied_twig(twig_folder, tmp_path)
    file = folder / "twig.safetensors"
    save_file(load_file(file) | {"draft_ids": ids}, file)
    with pytest.raises(ConfigError, match=r"draft_ids .* are no list of ids from 0 to"):
        load_twig(folder, specimen.base.network)


def test_a_twig_that_does_not_say_its_layer_beside_its_tensors_is_loaded(specimen, twig_folder, tmp_path):
    """Earlier versions wrote it into config.json alone."""
    folder = copied_twig(twig_folder, tmp_path)
    save_file(load_file(folder / "twig.safetensors"), folder / "twig.safetensors")
    assert load_twig(folder, specimen.base.network).geometry == GEOMETRY


def test_a_family_with_layers_without_attention_is_refused(tmp_path):
    tiny_families.write_checkpoint("lfm2_vl", tmp_path / "base")
    network = load_network(str(tmp_path / "base"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="a twig needs a base whose layers all have it"):
        Base.of(network)
