"""The base class of the config's sections, and types of their fields."""

from __future__ import annotations

import math
import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the config: frozen, and unknown keys are refused. Losses and targets define their own.

    A key's docstring stands below it and ends with [unit of a number; who reads it; what it is part of], for
    docs/config.md. `store`: another value needs another store. `run`: another value is another training.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError(
            f"expected a power of two, such as 0.0078125, so that decoding is exact; found {value:g}"
        )
    return value


PowerOfTwo = Annotated[float, AfterValidator(_power_of_two)]


# A path in which ~ is the home folder. A shell expands it neither in YAML nor behind the = of an override.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
