"""What `alignkd plan --on-paper` assumes of data and devices, because no config.json says it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, ValidationError

from pipeline.errors import ConfigError, did_you_mean
from pipeline.settings import Section
from pipeline.targets.target import TeacherFacts


class Assumptions(Section):
    """What no config.json says; means over all samples.

    `samples`                   samples of the data set, which are also those of an epoch
    `images_per_sample`         images of a sample, all of them distinct
    `vision_tokens`             N of an image in the teacher; a config that fixes N goes before
    `patches_per_vision_token`  patches of the teacher's tower for each vision token
    `student_...`               the same of the student; null: as in the teacher
    `text_before`               text tokens before the first image
    `text_rows`                 text tokens after the first vision token
    `answer_tokens`             those of the text rows that are labels
    `tflops`                    10^12 operations a second, sustained by all devices together
    """

    samples: int = Field(default=1_000_000, ge=1)
    images_per_sample: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    vision_tokens: int = Field(default=256, ge=1)
    patches_per_vision_token: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    student_vision_tokens: int | None = Field(default=None, ge=1)
    student_patches_per_vision_token: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    text_before: float = Field(default=35.0, ge=0, allow_inf_nan=False)
    text_rows: float = Field(default=110.0, ge=0, allow_inf_nan=False)
    answer_tokens: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    tflops: float = Field(default=125.0, gt=0, allow_inf_nan=False)

    def completed(self, teacher: TeacherFacts, student: TeacherFacts) -> Assumptions:
        """Return them with the vision tokens that the configs fix, and with the student's own."""
        tokens = teacher.num_vision_tokens or self.vision_tokens
        patches = self.student_patches_per_vision_token or self.patches_per_vision_token
        return self.model_copy(
            update={
                "vision_tokens": tokens,
                "student_vision_tokens": student.num_vision_tokens or self.student_vision_tokens or tokens,
                "student_patches_per_vision_token": patches,
            }
        )

    def lengths(self, vision_tokens: int, patches_per_vision_token: float) -> dict[str, float]:
        """Return at how many positions of a sample each part of a model runs.

        A projector is counted at the vision tokens, also where its first half runs at patches (MobileVLM V2).
        """
        of_images = self.images_per_sample * vision_tokens
        return {
            "tower": of_images * patches_per_vision_token,
            "projector": of_images,
            "embeddings": 0.0,  # a table, without a product
            "layers": self.text_before + of_images + self.text_rows,
            "head": self.answer_tokens,
        }

    def of_teacher(self) -> dict[str, float]:
        """Return `lengths` in the teacher."""
        return self.lengths(self.vision_tokens, self.patches_per_vision_token)

    def of_student(self) -> dict[str, float]:
        """Return `lengths` in the student, once completed."""
        assert self.student_vision_tokens and self.student_patches_per_vision_token
        return self.lengths(self.student_vision_tokens, self.student_patches_per_vision_token)


def parse_assumptions(given: Sequence[str]) -> Assumptions:
    """Return the assumptions of `KEY=VALUE` texts, over the defaults. Raises `ConfigError` naming the text."""
    values: dict[str, float] = {}
    for text in given:
        key, _, value = text.partition("=")
        if key not in Assumptions.model_fields:
            raise ConfigError(
                f"--assume {text}: no such assumption{did_you_mean(key, list(Assumptions.model_fields))}"
            )
        try:
            values[key] = float(value)
            Assumptions.model_validate({key: values[key]})
        except ValidationError as error:
            raise ConfigError(f"--assume {text}: {error.errors()[0]['msg']}") from error
        except ValueError as error:
            raise ConfigError(
                f"--assume {text}: expected KEY=VALUE with a number, such as tflops=125"
            ) from error
    return Assumptions.model_validate(values)
