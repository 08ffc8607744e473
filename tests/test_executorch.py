"""`export executorch`: programs in ExecuTorch's own runtime beside PyTorch, and the demo with llama.cpp."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_experiment import picture
from tiny_families import write_checkpoint

from pipeline.errors import ConfigError, PipelineError
from pipeline.export.executorch.export import export_executorch
from pipeline.export.executorch.folder import CARD, DECODER, VISION, ExecutorchFolder, write_executorch
from pipeline.export.executorch.inputs import Inputs, embedded
from pipeline.export.executorch.packages import importing, is_installed
from pipeline.export.executorch.runtime import Vision
from pipeline.export.executorch.verify import Found, Verification, verify_executorch
from pipeline.export.gguf.folder import export_gguf
from pipeline.export.llama_cpp.process import LlamaCpp, Settings
from pipeline.export.pictures import Pictures
from pipeline.export.source import Source
from pipeline.export.torch_model import TorchModel, relative_error
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.studies.demo import TEACHER, easy_vqa_folder, questions

needs_executorch = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="ExecuTorch is not installed; `make setup` installs it"),
]


class Export:
    """An export of a checkpoint, its comparison with PyTorch, and what was reported."""

    def __init__(self, checkpoint: Path, folder: Path, images: Path, *, decoder: bool = True):
        self.source = Source.of(str(checkpoint))
        self.said: list[str] = []
        self.folder, self.verification = export_executorch(
            self.source, folder, images=images, max_new_tokens=4, decoder=decoder, say=self.said.append
        )
        self.network = load_network(str(checkpoint), dtype=torch.float32).eval()

    @property
    def card(self) -> str:
        return (self.folder.path / CARD).read_text()

    @property
    def rows(self) -> dict[str, tuple[str, bool]]:
        """What the comparison found, and whether it passes, by what was compared."""
        assert self.verification is not None
        return {name: (found, passed) for name, found, _, passed in self.verification.rows}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of different shapes."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(picture(number, (30 + number, 50 - number)))
    return folder


@pytest.fixture(scope="module")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twenty pictures of the demo's test split."""
    folder = tmp_path_factory.mktemp("demo_images")
    for number in range(20):
        shutil.copy(easy_vqa_folder() / f"test/images/{number}.png", folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, demo_images: Path) -> Iterator[Export]:
    """The demo teacher's tower and projector."""
    yield Export(TEACHER, tmp_path_factory.mktemp("demo"), demo_images, decoder=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Export]:
    """A tiny MobileVLM V2 with its decoder, whose heads share keys and values in pairs."""
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2}
    checkpoint = write_checkpoint("mobilevlm", tmp_path_factory.mktemp("small"), **sizes)
    yield Export(checkpoint, tmp_path_factory.mktemp("small_export"), images)


# Vision


class TestVision:
    pytestmark = needs_executorch

    def test_vision_tokens_equal_pytorchs(self, demo: Export, demo_images: Path):
        vision = demo.folder.vision()
        for _, pixels in Pictures(demo_images, demo.source):
            with torch.no_grad():
                expected = demo.network.get_image_features(pixels[None]).pooler_output[0]
            assert relative_error(vision(pixels[None]), expected) < 1e-5

    def test_the_comparison_passes_and_stands_in_the_card(self, demo: Export):
        assert demo.verification is not None and demo.verification.passed
        assert list(demo.rows) == ["vision tokens"]
        assert str(demo.verification) in demo.card

    @pytest.mark.parametrize("part", ["vision_tower", "mm_projector"])
    def test_other_weights_fail_the_comparison(
        self, demo: Export, demo_images: Path, tmp_path: Path, part: str
    ):
        other = _changed(TEACHER, tmp_path / "other", part)
        options = {"question": "What is it?", "max_new_tokens": 1}
        result = verify_executorch(demo.folder, Source.of(str(other)), demo_images, **options)
        assert not result.passed
        assert min(one.vision_error for one in result.found) > 1e-3

    def test_the_demo_answers_with_its_tower_in_executorch_and_its_language_model_in_llama_cpp(
        self, demo: Export, demo_images: Path, tmp_path: Path
    ):
        pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; `make setup` installs it")
        vision, pictures = demo.folder.vision(), list(Pictures(demo_images, demo.source))
        language_model = export_gguf(demo.source, tmp_path, quant="f16", vision=None, say=lambda _: None)
        right = 0
        with LlamaCpp(Settings(language_model.model, context=512)) as runtime:
            for question, answer, number in _one_question_an_image():
                torch_model = TorchModel(demo.source, question, max_new_tokens=8)
                _, pixels = pictures[number]
                expected = torch_model.answer(pixels).answer_ids
                tokens = vision(pixels[None]).numpy()
                found = runtime.answer(torch_model.prompt, embeddings=tokens, max_new_tokens=8)
                assert found.answer_ids == expected
                right += found.text.strip() == answer
        assert right >= 19

    def test_a_tower_that_is_not_clip(
        self, tmp_path: Path, images: Path, tiny_model: Callable[..., MobileVLMForCausalLM]
    ):
        write_checkpoint("mobilevlm", tmp_path / "model")
        blocks = [[1, 1, 8, 3, 2], [1, 2, 16, 5, 2]]
        tower = {"image_size": 32, "stem_channels": 8, "blocks": blocks}
        model = tiny_model(vocab_size=512, vision_tower_type="efficientnet_lite", vision_config=tower)
        model.save_pretrained(tmp_path / "model")
        found = Export(tmp_path / "model", tmp_path / "export", images, decoder=False)
        assert found.folder.mark["pixel_values"] == [1, 3, 32, 32]


# Language model


class TestDecoder:
    pytestmark = needs_executorch

    def test_a_prompt_in_one_piece_in_several_and_token_by_token(self, small: Export):
        decoder = small.folder.decoder()
        ids = torch.arange(20, 60)
        with torch.no_grad():
            expected = small.network(input_ids=ids[None]).logits[0]
        embeddings = decoder.embed(ids)
        assert relative_error(decoder.logits(embeddings), expected[-1]) < 1e-5
        decoder.logits(embeddings[:17])
        assert relative_error(decoder.logits(embeddings[17:], position=17), expected[-1]) < 1e-5
        # Behind what the cache held of the longer prompt.
        decoder.chunk = 3
        assert relative_error(decoder.logits(embeddings[:11]), expected[10]) < 1e-5
        for number in range(11, 15):
            one = decoder.logits(embeddings[number : number + 1], position=number)
            assert relative_error(one, expected[number]) < 1e-5

    def test_answers_about_pictures_equal_pytorchs(self, small: Export):
        assert small.rows["greedy answers"] == ("20 of 20 equal", True)
        assert small.rows["logits"][1]

    def test_a_prompt_longer_than_the_cache_is_refused(self, small: Export):
        decoder = small.folder.decoder()
        assert decoder.context == 256
        with pytest.raises(PipelineError, match="257 positions were asked for, its cache has 256"):
            decoder.logits(torch.zeros(257, 32))

    def test_another_family(self, tmp_path: Path, images: Path):
        checkpoint = write_checkpoint("llava", tmp_path / "model", num_hidden_layers=1)
        found = Export(checkpoint, tmp_path / "export", images)
        assert found.folder.has_decoder
        assert found.rows["greedy answers"] == ("20 of 20 equal", True)

    def test_a_decoder_that_is_not_causal_is_left_out_and_said(self, tmp_path: Path, images: Path):
        checkpoint = write_checkpoint("gemma3", tmp_path / "model")
        found = Export(checkpoint, tmp_path / "export", images)
        assert not found.folder.has_decoder
        [said] = [line for line in found.said if DECODER in line]
        assert "the decoder of 'gemma3' is not exported" in said
        assert "There is no `decoder.pte`" in found.card
        assert "llama_batch" not in found.card  # it would see pictures one way alone
        assert list(found.rows) == ["vision tokens"]


# Inputs


def test_the_steps_of_the_card_make_the_pixels_of_the_checkpoints_processor(tmp_path: Path):
    source = Source.of(str(write_checkpoint("mobilevlm", tmp_path / "model")))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "wide.png").write_bytes(picture(1, (40, 30)))
    [(_, expected)] = Pictures(tmp_path / "images", source, fewest=1)
    image = Image.open(tmp_path / "images" / "wide.png")
    square = Image.new("RGB", (40, 40), (122, 116, 104))
    square.paste(image, (0, 5))
    values = np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC), np.float32) / 255
    mean, deviation = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    by_hand = ((values - mean) / deviation).transpose(2, 0, 1)
    np.testing.assert_allclose(expected.numpy(), by_hand, atol=1e-5)
    prompt = Inputs(source).prompt("What is it?", image)
    np.testing.assert_allclose(prompt.pixels[0].numpy(), by_hand, atol=1e-5)
    assert int(prompt.is_vision.sum()) == 4


def test_vision_tokens_take_their_places_in_order():
    embeddings, vision = torch.zeros(5, 2), torch.tensor([[1.0, 1], [2, 2]])
    is_vision = torch.tensor([False, True, False, True, False])
    assert embedded(embeddings, is_vision, vision)[:, 0].tolist() == [0, 1, 0, 2, 0]
    with pytest.raises(ConfigError, match="the prompt has 2 places for vision tokens, the picture has 1"):
        embedded(embeddings, is_vision, vision[:1])


# Refusals


class TestRefusals:
    pytestmark = needs_executorch

    def test_a_tower_without_a_size_of_its_own(self, tmp_path: Path):
        source = Source.of(str(write_checkpoint("qwen3_vl", tmp_path / "model")))
        with pytest.raises(ConfigError, match="has no size of its own"):
            write_executorch(source, tmp_path / "export")

    @pytest.mark.parametrize(
        ("family", "reason"),
        [("llava_next", "data-dependent expression"), ("smolvlm", "shapes inside it depend on the values")],
    )
    def test_a_tower_that_torchs_exporter_does_not_take(self, tmp_path: Path, family: str, reason: str):
        source = Source.of(str(write_checkpoint(family, tmp_path / "model")))
        message = f"does not take the vision tower of '{family}': .*{reason}"
        with pytest.raises(ConfigError, match=message) as refused:
            write_executorch(source, tmp_path / "export", say=lambda _: None)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "export" / "export.json").exists()

    @pytest.mark.parametrize(
        "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 64]
    )
    def test_a_damaged_program(self, demo: Export, tmp_path: Path, damage: Callable[[bytes], bytes]):
        file = tmp_path / VISION
        file.write_bytes(damage((demo.folder.path / VISION).read_bytes()))
        with pytest.raises(PipelineError, match="ExecuTorch does not load it") as refused:
            Vision(file)
        assert "\n" not in str(refused.value)

    def test_a_changed_byte_is_seen_before_a_comparison(
        self, demo: Export, demo_images: Path, tmp_path: Path
    ):
        shutil.copytree(demo.folder.path, tmp_path / "copy")
        data = bytearray((tmp_path / "copy" / VISION).read_bytes())
        data[-1000] ^= 1
        (tmp_path / "copy" / VISION).write_bytes(data)
        copy = ExecutorchFolder(tmp_path / "copy", demo.folder.mark)
        with pytest.raises(PipelineError, match=r"eyes\.pte is not as it was written"):
            verify_executorch(copy, demo.source, demo_images, question="What?", max_new_tokens=1)

    def test_a_picture_of_another_shape(self, demo: Export):
        with pytest.raises(
            PipelineError, match=r"does not take inputs \(1, 3, 32, 32\).*it takes \(1, 3, 64, 64\)"
        ):
            demo.folder.vision()(torch.zeros(1, 3, 32, 32))

    def test_a_folder_that_holds_another_export(self, demo: Export, small: Export):
        with pytest.raises(ConfigError, match="holds another export"):
            write_executorch(small.source, demo.folder.path, decoder=False)

    def test_the_same_export_again_does_nothing(self, demo: Export):
        before = (demo.folder.path / VISION).stat().st_mtime_ns
        said: list[str] = []
        again = write_executorch(demo.source, demo.folder.path, decoder=False, say=said.append)
        assert again.mark == demo.folder.mark
        assert (demo.folder.path / VISION).stat().st_mtime_ns == before
        assert "nothing was done" in said[0]


def test_without_executorch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ConfigError, match=r"alignkd\[executorch\]"), importing(by="a test"):
        import executorch.runtime  # noqa: F401  # pyright: ignore[reportMissingImports]


# The card


class TestCard:
    pytestmark = needs_executorch

    def test_the_card_names_shapes_and_preprocessing(self, demo: Export):
        for words in ("(1, 3, 64, 64)", "(16, 192)", "(122, 116, 104)", "0.48145466", demo.source.digest):
            assert words in demo.card
        assert "one `llama_batch` whose `embd` holds the 16 rows" in demo.card
        assert str(demo.folder.path) not in demo.card

    def test_the_card_of_a_decoder(self, small: Export):
        assert "embeddings (S, 32)" in small.card
        assert "keys and values of 256 positions" in small.card
        assert small.folder.mark["stops"] == [2]


def _changed(checkpoint: Path, folder: Path, part: str) -> Path:
    """Copy a checkpoint and multiply the matrices of a part by 1.05."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = {n: t * 1.05 if part in n and t.ndim > 1 else t for n, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _one_question_an_image() -> Iterator[tuple[str, str, int]]:
    """Yield the demo's first question about each of its first twenty test images."""
    first: dict[int, tuple[str, str, int]] = {}
    for question in questions("test"):
        first.setdefault(question[2], question)
    yield from (first[number] for number in range(20))


def test_an_error_that_is_no_number_is_no_pass():
    sound, broken = Found(1e-7, 1.0, 1.0), Found(float("nan"), 1.0, 1.0)
    assert Verification([sound]).passed
    assert not Verification([sound, broken]).passed
