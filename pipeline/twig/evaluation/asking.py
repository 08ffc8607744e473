"""The base with the held-out questions that have an image, as prompts in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation
from pipeline.errors import ConfigError, building
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.question_batches import QuestionBatches
from pipeline.evaluation.questions import Question, read_questions
from pipeline.models.loading import load_network
from pipeline.models.vlm import VisionLanguageModel
from pipeline.twig.base import Base
from pipeline.twig.decoding.generate import Answers
from pipeline.twig.decoding.prompts import Prompts

T = TypeVar("T")


@dataclass(frozen=True)
class Asker:
    """A base and its `questions`; `num_text_only` others without an image were left out.

    Questions with short answers come first: a batch takes as long as its longest answer.
    """

    base: Base
    batches: QuestionBatches
    questions: list[Question]
    num_text_only: int
    batch_size: int
    max_new_tokens: int

    @classmethod
    def of(cls, config: Config, *, limit: int | None) -> Asker:
        """Load the config's teacher, which is the base, and read the test sets, of each `limit` images (None: all).

        Raises `ConfigError` without test sets, or if none of their questions has an image.
        """
        if config.evaluate is None:
            raise ConfigError("the config has no `evaluate` section; name held-out shards as evaluate.shards")
        model, settings = config.teacher.model, config.evaluate
        preparation = load_preparation(model, config.data)
        every = list(read_questions(settings, preparation, config.data))
        seen = [question for question in every if question.sizes]
        if not seen:
            raise ConfigError(
                f"evaluate.shards: none of the {len(every)} questions has an image, so there is nothing to prune; "
                "name a test set with images"
            )
        network = load_network(model, dtype=settings.dtype).eval()
        with building(f"model {model} on a GPU", then="set evaluate.dtype to bfloat16"):
            network = network.to("cuda" if torch.cuda.is_available() else "cpu")
        vlm = VisionLanguageModel(network)
        return cls(
            Base.of(network),
            QuestionBatches(vlm, preparation, config.data),
            sorted(limited(seen, limit), key=_lengths),
            len(every) - len(seen),
            settings.batch_size,
            settings.max_new_tokens,
        )

    @property
    def preparation(self) -> Preparation:
        return self.batches.preparation

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.preparation.stop_ids)

    def prompts(self, questions: Sequence[Question]) -> Prompts:
        """Return questions as one batch."""
        inputs = self.batches.vlm.inputs(self.batches.padded(questions), self.batches.features(questions))
        return Prompts.of(inputs, image_token_id=self.preparation.image_token_id)

    def in_batches(self) -> Iterator[tuple[list[Question], Prompts]]:
        """Yield all questions in batches of similar lengths."""
        for start in range(0, len(self.questions), self.batch_size):
            some = self.questions[start : start + self.batch_size]
            yield some, self.prompts(some)

    def predictions(self, questions: Sequence[Question], answers: Answers) -> list[Prediction]:
        """Return the answers as text."""
        texts = self.preparation.tokenizer.batch_decode(answers.tokens, skip_special_tokens=True)
        return [
            replace(question.unanswered, prediction=text)
            for question, text in zip(questions, texts, strict=True)
        ]


def _lengths(question: Question) -> tuple[int, int]:
    """The lengths of the reference and of the prompt."""
    return len(question.reference.ids), len(question.prompt)


def key_of(question: Question) -> str:
    """Return a name of a question that no other one of any test set has."""
    return f"{question.unanswered.test_set}/{question.unanswered.key}"


def limited(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the questions about `limit` images of each test set, evenly chosen; None: all."""
    chosen: list[Question] = []
    for test_set in dict.fromkeys(question.unanswered.test_set for question in questions):
        of_set = [question for question in questions if question.unanswered.test_set == test_set]
        images = list(dict.fromkeys(question.unanswered.group for question in of_set))
        wanted = set(spread(images, len(images) if limit is None else limit))
        chosen += [question for question in of_set if question.unanswered.group in wanted]
    return chosen


def spread(things: Sequence[T], number: int) -> list[T]:
    """Return `number` of some things, evenly chosen; all, if there are no more."""
    if number >= len(things):
        return list(things)
    return [things[round(n * (len(things) - 1) / max(1, number - 1))] for n in range(number)]
