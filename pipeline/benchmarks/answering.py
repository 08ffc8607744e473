"""A model's greedy answers to benchmark questions, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.benchmarks.benchmark import Benchmark, BenchmarkQuestion
from pipeline.config.config import DataConfig, EvaluateConfig
from pipeline.data.conversation import TokenizedSample
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.templates import IMAGE_TOKEN, Turn
from pipeline.distill.join.memory import TensorCache
from pipeline.errors import BadSample, PipelineError, building
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import Checkpoint, checkpoint_folder
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import MobileVLMConfig
from pipeline.models.mobilevlm.tokenizer import template_of
from pipeline.models.vlm import ImageFeatures, VisionLanguageModel

FEATURE_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class HowToAsk:
    """How models are asked: the config's settings, or None for the originals'."""

    data: DataConfig | None = None
    evaluate: EvaluateConfig | None = None

    def data_for(self, model: str) -> DataConfig:
        """Return the settings of a model's text and images: the config's, or those of its own family."""
        return self.data or DataConfig(shards="none", template=_template_of(model))

    def dtype_for(self, model: str) -> str:
        """Return the dtype: the config's, else the original's float16, for other families the checkpoint's own.

        Without a GPU it is float32: half precision is slow there.
        """
        if self.evaluate is not None:
            return self.evaluate.dtype
        if not torch.cuda.is_available():
            return "float32"
        return "float16" if _is_mobilevlm(model) else "auto"

    @property
    def batch_size(self) -> int:
        """Questions answered together."""
        default = EvaluateConfig.model_fields["batch_size"].default
        return self.evaluate.batch_size if self.evaluate else default


def _is_mobilevlm(model: str) -> bool:
    return isinstance(read_config(checkpoint_folder(model)), MobileVLMConfig)


def _template_of(model: str) -> Any:
    if not _is_mobilevlm(model):
        return "chat"
    return template_of(model)


NamedImage = tuple[str, bytes]  # two images of one name are the same


@dataclass(frozen=True, slots=True)
class Prompt:
    """Turns, the last of which is to be answered, and their images in order; `where` names it in errors."""

    where: str
    turns: Sequence[Turn]
    images: Sequence[NamedImage]


class Answerer:
    """A checkpoint that answers questions. Its weights are loaded when the first question is asked."""

    def __init__(self, model: str, how: HowToAsk):
        self.model, self.how = model, how
        self.data, self.dtype = how.data_for(model), how.dtype_for(model)
        self.weights = Checkpoint(model).digest()
        self._loaded: VisionLanguageModel | None = None

    def preparation(self, benchmark: Benchmark) -> Preparation:
        """Return how this benchmark's questions become tokens and pixels."""
        return self.preparation_that(crops=benchmark.crops)

    def preparation_that(self, *, crops: bool) -> Preparation:
        """Return the preparation with the original's preprocessing for ScienceQA, or for all others."""
        aspect = {"image_aspect_ratio": "square"} if crops else {}
        return load_preparation(self.model, self.data.model_copy(update=aspect))

    def identity(self, benchmark: Benchmark, preparation: Preparation) -> dict[str, Any]:
        """Return what answers depend on; only answers of an equal identity are continued."""
        digests = preparation.digests()
        return {**benchmark.prompt_settings(), "weights": self.weights, "dtype": self.dtype, **digests}

    def answers(
        self, benchmark: Benchmark, preparation: Preparation, questions: Sequence[BenchmarkQuestion]
    ) -> Iterator[tuple[Sequence[BenchmarkQuestion], list[str]]]:
        """Yield batches of questions with their answers, in the order of the questions."""
        if not questions:
            return
        answer = self.asking(preparation, max_new_tokens=benchmark.max_new_tokens)
        for start in range(0, len(questions), self.how.batch_size):
            batch = questions[start : start + self.how.batch_size]
            images = {question.image_id: question.image.read() for question in batch}
            yield batch, answer([_asked(question, images[question.image_id]) for question in batch])

    def asking(
        self, preparation: Preparation, *, max_new_tokens: int
    ) -> Callable[[Sequence[Prompt]], list[str]]:
        """Return a function from a batch of prompts to their greedy answers; it holds features of images."""
        vlm = self._vlm()
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=preparation.pad_id,
            eos_token_id=preparation.stop_ids,
        )
        # Replaces the checkpoint's own, from which transformers takes whatever a call does not name.
        vlm.network.generation_config = settings
        held = TensorCache(FEATURE_CACHE_BYTES)
        return lambda prompts: _answer(vlm, preparation, prompts, held, settings)

    def _vlm(self) -> VisionLanguageModel:
        if self._loaded is None:
            network = load_network(self.model, dtype=self.dtype).eval()
            with building(f"model {self.model} on a GPU", then="set evaluate.dtype to bfloat16"):
                network = network.to("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = VisionLanguageModel(network)
        return self._loaded


def _answer(
    vlm: VisionLanguageModel,
    preparation: Preparation,
    asked: Sequence[Prompt],
    held: TensorCache,
    settings: GenerationConfig,
) -> list[str]:
    """Greedy answers to a batch, prompts padded on the left, so that each is followed by its answer."""
    prompts = [_tokenized(preparation, prompt) for prompt in asked]
    batch = pad_tokens(prompts, preparation.image_token_id, on_the_left=True)
    batch = {n: v.to(vlm.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    images = [image for prompt in asked for image in prompt.images]
    sizes = [size for prompt in prompts for size in prompt.sizes]
    features = _features(vlm, preparation, images, sizes, held) if images else None
    made = vlm.generate(batch, features, generation_config=settings)
    return [text.strip() for text in preparation.tokenizer.batch_decode(made, skip_special_tokens=True)]


def _asked(question: BenchmarkQuestion, image: bytes) -> Prompt:
    """Return a question with its image in front, as the original writes it."""
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{question.text}"}]
    return Prompt(f"question {question.id} about {question.image_id}", turns, [(question.image_id, image)])


def prompt_of(preparation: Preparation, question: BenchmarkQuestion, image: bytes) -> TokenizedSample:
    """Return the ids of a question with its image."""
    return _tokenized(preparation, _asked(question, image))


def _tokenized(preparation: Preparation, prompt: Prompt) -> TokenizedSample:
    try:
        return preparation.prompt(prompt.turns, preparation.sizes_of([data for _, data in prompt.images]))
    except BadSample as error:
        raise PipelineError(f"{prompt.where}: {error.reason}") from error


@torch.no_grad()
def _features(
    vlm: VisionLanguageModel,
    preparation: Preparation,
    images: Sequence[NamedImage],
    sizes: Sequence[int],
    held: TensorCache,
) -> ImageFeatures:
    """The features of the prompts' images. The tower runs once for each distinct image, where it can be split."""
    names, files = [name for name, _ in images], dict(images)

    def pixels(wanted: Sequence[str]) -> list[Any]:
        return [preparation.preprocess(files[name]) for name in wanted]

    try:
        if not vlm.splits_tower:
            return vlm.encode(pixels(names), sizes)
        patches = held.stack(names, lambda fresh: vlm.patch_features(pixels(fresh)))
    except BadSample as error:
        raise PipelineError(
            f"an image of {', '.join(sorted(files))}: {error.reason}; download it again"
        ) from error
    return vlm.encode((), sizes, patch_features=patches)
