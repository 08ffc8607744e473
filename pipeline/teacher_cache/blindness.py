"""The blindness alarm: whether the teacher's answers depend on the images, as measured, in words and as JSON.

`pipeline/teacher_cache/swapped_images.py` measures it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a look at a store does not need it
    from pipeline.config.model_settings import TeacherConfig

FIELD = "blindness"  # of the manifest's provenance
MIN_PAIRS = 8
# The interval's lower end must be above both: nats a token, and a share of the advantage. docs/decisions.md has the
# measurements that they were chosen by.
MIN_ADVANTAGE = 0.01
MIN_SHARE = 0.5
FRAME = "!" * 100


@dataclass(frozen=True)
class Blindness:
    """The log probability of answers with the right images, compared with that under another sample's images.

    Log probabilities are means over samples, in nats a token. `advantage` is their difference, with its 95%
    interval from `low` to `high`. In `right_wins` of the `pairs` the right images give the larger one. With a
    `not_measured`, which says why, all numbers but `pairs` are 0.
    """

    pairs: int
    right: float = 0.0
    wrong: float = 0.0
    advantage: float = 0.0
    low: float = 0.0
    high: float = 0.0
    right_wins: int = 0
    not_measured: str = ""

    @property
    def is_blind(self) -> bool:
        """Whether it was measured, and the advantage of the right images is none, tiny or uncertain."""
        return not self.not_measured and self.low <= max(MIN_ADVANTAGE, MIN_SHARE * self.advantage)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_blind": self.is_blind}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Blindness:
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    def __str__(self) -> str:
        if self.not_measured:
            return f"not measured: {self.not_measured}"
        alarm = "the teacher may be BLIND: " if self.is_blind else ""
        return (
            f"{alarm}the right images add {self.advantage:.3f} nats a token to the log probability of answers, "
            f"95% interval [{self.low:.3f}, {self.high:.3f}], and are ahead in {self.right_wins} of {self.pairs}"
        )


def warn_of_blindness(found: Blindness, teacher: TeacherConfig, *, then: str) -> None:
    """Print a framed warning to stderr if the teacher is blind and may not be; `then` says how the work goes on."""
    if not teacher.blind_ok and found.is_blind:
        print(_warning(found, teacher.model, then), file=sys.stderr, flush=True)


def _warning(found: Blindness, teacher: str, then: str) -> str:
    text = f"""\
WARNING: the teacher {teacher} may be BLIND: its answers hardly depend on the images.

Measured on {found.pairs} samples, each with its own images and with those of another sample:
  log probability of the answers   {found.right:.3f} and {found.wrong:.3f} nats a token
  advantage of the right images    {found.advantage:.3f}, 95% interval [{found.low:.3f}, {found.high:.3f}]
  the right images are ahead in    {found.right_wins} of {found.pairs} samples
The interval of a teacher that uses the images is above {MIN_ADVANTAGE} and above half of the advantage.
Nothing else shows this: the loss of a student of a blind teacher looks healthy.

Usual reasons:
  - The vision weights were not loaded when the checkpoint was made. Look for missing keys in the log of that step.
  - The projector is not trained: a language model and a tower were only put together.
  - The prompt lacks the image. Look at a sample: `alignkd inspect sample STORE KEY`.
  - The text is enough for the answers. If that is meant, set teacher.blind_ok: true.

Check the teacher: `alignkd models check {shlex.quote(teacher)}`. {then}"""
    return f"{FRAME}\n{text}\n{FRAME}"
