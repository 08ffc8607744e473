"""Exported files in a real llama.cpp, compared with PyTorch: ids, image embeddings, logits, greedy answers.

The file's weights are compared with the checkpoint's, and llama.cpp with PyTorch that holds the file's own, so that
a difference is one of computing, not of quantising. What quantising costs stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.export.gguf.checking import check_layout
from pipeline.export.gguf.folder import GGUFFolder
from pipeline.export.gguf.vision import PROJECTOR, TOWER
from pipeline.export.llama_cpp.defect import EMBEDDINGS_LIMIT, with_right_eyes
from pipeline.export.llama_cpp.library import build_name
from pipeline.export.llama_cpp.process import LlamaCpp, Settings
from pipeline.export.pictures import Pictures
from pipeline.export.source import Source
from pipeline.export.torch_model import TorchModel, relative_error
from pipeline.text_table import text_table

# Relative errors, rms over rms. Unquantised matrices are multiplied in 16 bits; quantised ones by activations of 8.
WEIGHTS_LIMIT = {"f16": 0.002, "q8_0": 0.02, "q4_k_m": 0.3}
LOGITS_LIMIT = {"f16": 0.02, "q8_0": 0.05, "q4_k_m": 0.05}
TIE = 8.0  # times the rms error of the logits: two tokens that lie nearer are equally good


@dataclass
class Found:
    """What one picture showed."""

    ids_equal: bool
    embeddings_error: float
    logits_error: float
    answer_equal: bool
    is_tie: bool
    next_token_as_checkpoint: float
    answer_as_checkpoint: bool


@dataclass(frozen=True)
class Verification:
    """The pictures' results, and what was found of llama.cpp's tower; None where it has no eyes."""

    found: list[Found]
    # The relative error beside the checkpoint that is nearest to its limit, the tensor's name, and the limit.
    weights: tuple[float, str, float]
    eyes: str | None
    quant: str
    vision: str | None

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """What was compared, what was found, what is asked, and whether it passes."""
        found, count = self.found, len(self.found)
        embeddings = float(
            np.max([one.embeddings_error for one in found])
        )  # `max` passes over what is no number
        logits = float(np.max([one.logits_error for one in found]))
        ids, equal = sum(one.ids_equal for one in found), sum(one.answer_equal for one in found)
        good = sum(one.answer_equal or one.is_tie for one in found)
        limit = LOGITS_LIMIT[self.quant]
        error, name, most = self.weights
        rows = [
            (
                "weights in the file",
                f"{error:.2e} off" + f", {name}" * (error > most),
                f"{most:g}",
                error <= most,
            ),
            ("token ids", f"{ids} of {count} equal", "all", ids == count),
        ]
        if self.vision:
            most = EMBEDDINGS_LIMIT[self.vision]
            rows.append(("image embeddings", f"{embeddings:.2e} off", f"{most:g}", embeddings <= most))
        rows.append(("logits", f"{logits:.2e} off", f"{limit:g}", logits <= limit))
        ties = f", {good - equal} more at ties" if good > equal else ""
        rows.append(("greedy answers", f"{equal} of {count} equal{ties}", "all", good == count))
        return rows

    @property
    def passed(self) -> bool:
        return all(passed for *_, passed in self.rows)

    def __str__(self) -> str:
        table = [["llama.cpp beside PyTorch with the file's weights", "found", "limit", ""]]
        table += [[*row, "ok" if passed else "DIFFERS"] for *row, passed in self.rows]
        count = len(self.found)
        next_token = np.mean([one.next_token_as_checkpoint for one in self.found])
        answers = sum(one.answer_as_checkpoint for one in self.found)
        cost = (
            f"beside the checkpoint itself: {next_token:.1%} of next tokens and {answers} of {count} answers are the "
            "same"
        )
        return "\n".join([text_table(table, justify="left"), "", cost, *([self.eyes] if self.eyes else [])])


def verify_gguf(
    folder: GGUFFolder,
    source: Source,
    images: Path,
    *,
    question: str,
    max_new_tokens: int,
    threads: int,
    say: Callable[[str], None] = print,
) -> Verification:
    """Compare what was written with PyTorch on every picture of a folder, at least 20.

    Raises `PipelineError` if llama.cpp ends over a file, or if its tower computes neither CLIP nor the known defect.
    """
    folder.check_files()
    pictures = Pictures(images, source)
    torch_model = TorchModel(source, question, max_new_tokens=max_new_tokens)
    check_layout(folder, source, torch_model.network.state_dict())
    say(f"{len(pictures)} images through the checkpoint in PyTorch")
    expected = [torch_model.answer(pixels) for _, pixels in pictures]
    weights = _worst(torch_model.load(folder.tensors(torch_model.shapes)), folder)
    settings = Settings(folder.model, folder.mmproj, context=torch_model.context, threads=threads)
    eyes = None
    with torch.no_grad(), ExitStack() as stack:
        if folder.mmproj:
            square, pixels = next(iter(pictures))
            settings, eyes = with_right_eyes(settings, torch_model.network, square, pixels)
        say(
            f"{len(pictures)} images through llama.cpp {build_name()}, compared with the file's weights in PyTorch"
        )
        runtime = stack.enter_context(LlamaCpp(settings))
        found = []
        for (square, pixels), wanted in zip(pictures, expected, strict=True):
            embeddings = torch_model.embeddings(pixels)
            given = {"image": square} if folder.mmproj else {"embeddings": embeddings}
            answered = runtime.answer(torch_model.prompt, max_new_tokens=max_new_tokens, **given)
            assert answered.logits is not None and answered.embeddings is not None
            logits, regrets = torch_model.judged(answered.answer_ids, embeddings)
            next_tokens = answered.logits.argmax(-1)
            found.append(
                Found(
                    ids_equal=answered.prompt_ids == torch_model.prompt_ids,
                    embeddings_error=relative_error(answered.embeddings, embeddings),
                    logits_error=relative_error(answered.logits, logits),
                    answer_equal=max(regrets) == 0,
                    is_tie=max(regrets) <= TIE * float(np.sqrt(np.mean((answered.logits - logits) ** 2))),
                    next_token_as_checkpoint=float(np.mean(next_tokens == wanted.next_tokens)),
                    answer_as_checkpoint=answered.answer_ids == wanted.answer_ids,
                )
            )
    return Verification(found, weights, eyes, folder.quant, folder.vision)


def _worst(errors: dict[str, float], folder: GGUFFolder) -> tuple[float, str, float]:
    """Return the error of a tensor that is nearest to its limit, the tensor's name, and the limit."""
    limits = dict.fromkeys(errors, WEIGHTS_LIMIT[folder.quant])
    if folder.vision:
        limits |= {
            name: WEIGHTS_LIMIT[folder.vision] for name in errors if name.startswith((TOWER, PROJECTOR))
        }
    shares = np.array([errors[name] / limits[name] for name in errors])
    name = list(errors)[int(np.where(np.isnan(shares), np.inf, shares).argmax())]
    return errors[name], name, limits[name]
