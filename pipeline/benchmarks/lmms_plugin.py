"""The plugin of lmms-eval: its model `alignkd`. lmms-eval alone imports this file, by the entry point."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from pipeline.benchmarks.answering import Answerer
from pipeline.benchmarks.lmms_requests import Request, RequestAnswerer, how_to_ask
from pipeline.errors import ConfigError
from pipeline.progress import Progress


def manifest() -> ModelManifest:
    """Return what `--model alignkd` stands for."""
    return ModelManifest(model_id="alignkd", chat_class_path=f"{__name__}.AlignKD")


class AlignKD(lmms):
    """A checkpoint of any family of alignkd, which answers as in `alignkd evaluate --suite`."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,  # for `--batch_size auto`, which is refused
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()  # with several processes it chooses each one's GPU
        self._check_device(device)
        self.model = RequestAnswerer(Answerer(pretrained, how_to_ask(pretrained, batch_size, dtype)))

    def _check_device(self, asked: str | None) -> None:
        """Raise `ConfigError` if another kind of device is asked for than the one that is used."""
        used = "cuda" if torch.cuda.is_available() else "cpu"
        if asked is not None and torch.device(asked).type != used:
            raise ConfigError(
                f"--device {asked}: alignkd uses {used} here; choose GPUs, or none, by CUDA_VISIBLE_DEVICES"
            )

    @property
    def device(self) -> torch.device:
        """Where lmms-eval's own tensors lie when several processes count their requests."""
        return self.accelerator.device

    def generate_until(self, requests: list[Request]) -> list[str]:
        """Return greedy answers, in the order of the requests."""
        answers = [""] * len(requests)
        with Progress("lmms-eval", unit="requests", doing=f"asking {self.model.answerer.model}") as progress:
            for done, (number, answer) in enumerate(self.model.answers(requests, self.task_dict), start=1):
                answers[number] = answer
                context, _, settings, *_ = requests[number].args
                self.cache_hook.add_partial("generate_until", (context, settings), answer)
                progress(done, len(requests))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "alignkd answers generate_until tasks only; leave out tasks of loglikelihood"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "alignkd answers generate_until tasks only; leave out tasks of several rounds"
        )
