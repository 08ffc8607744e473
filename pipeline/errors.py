"""The errors that `pipeline` raises: each says what was asked, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class PipelineError(ValueError):
    """Something outside the program (a file, a setting, a sample) is not as it must be."""


class ConfigError(PipelineError):
    """A setting, or a file that a setting names, cannot be used."""


class ShardError(PipelineError):
    """A shard as a whole cannot be read; none of its samples may be trusted."""


class PackError(PipelineError):
    """Annotations cannot be packed into shards."""


class JoinError(PipelineError):
    """A sample and what the store holds for it do not belong together."""


class BadSample(PipelineError):  # noqa: N818 - it names the thing that is rejected
    """One sample cannot be used. It is listed with its reason and counted; the run goes on.

    `kind` is a fixed phrase to count by ("missing image file"), `detail` what was found in this sample.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(self.reason)

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        # Exceptions pickle by `args`, which is the whole reason here; worker processes must keep both parts.
        return (type(self), (self.kind, self.detail))


class TrainingStopped(BaseException):  # no error: like an interrupt, nothing may catch it and go on
    """SIGTERM ended a training after a step; its checkpoint is written."""


def did_you_mean(name: str, known: Sequence[str] | set[str]) -> str:
    """The nearest known name as a question, else all known names if they are few."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= 20 else ""
