"""The base of every section of the config: frozen, and closed to names that it does not know."""

from __future__ import annotations

import math
import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config. Losses and targets define theirs beside what they set."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _power_of_two(value: float) -> float:
    if math.frexp(value)[0] != 0.5:
        raise ValueError(
            f"expected a power of two, such as 0.0078125, so that decoding is exact; found {value:g}"
        )
    return value


PowerOfTwo = Annotated[float, AfterValidator(_power_of_two)]


# A path whose ~ is the home folder: no shell puts it in after the = of an override, and none reads YAML.
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
