"""The tiny checkpoints load as published ones do, and are what other tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, PARTS, write_checkpoint
from tiny_tokenizers import SPECIAL_TOKENS
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

ANY_TEXT = "Hello, {world}!  <html> a\tb\n\n  c' ~ \x01"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each family that transformers knows. Tests must not write into it."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(family, folder / family) for family in PARTS}


@pytest.mark.parametrize("size", [{}, {"num_hidden_layers": 3, "hidden_size": 24}])
@pytest.mark.parametrize("family", PARTS)
def test_every_weight_is_loaded(family, size, tmp_path):
    folder = write_checkpoint(family, tmp_path, **size)
    assert AutoConfig.from_pretrained(folder).model_type == family
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    text = model.config.get_text_config()
    assert {name: getattr(text, name) for name in size} == size
    assert len(model.get_decoder().layers) == text.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_same_weights_and_leaves_torchs_generator_alone(family, tmp_path):
    torch.manual_seed(1)
    first, again, other = (
        load_file(write_checkpoint(family, tmp_path / str(n), seed=seed) / "model.safetensors")
        for n, seed in enumerate((3, 3, 4))
    )
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", PARTS)
def test_the_tokenizer_keeps_every_text_and_has_each_special_token_as_one_id(family, folders):
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert tokenizer.decode(tokenizer(ANY_TEXT, add_special_tokens=False)["input_ids"]) == ANY_TEXT
    special = SPECIAL_TOKENS[family]
    for token in special.all():
        assert len(tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]) == 3, token
    config = AutoConfig.from_pretrained(folders[family])
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(special.image)
    assert len(tokenizer) <= config.get_text_config().vocab_size
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == special.adds_bos
