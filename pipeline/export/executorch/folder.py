"""The folder of an export: the programs, the tokenizer and processor, and what all of it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.export.executorch.decoder import context_of, why_not, write_decoder
from pipeline.export.executorch.inputs import Inputs, Prompt
from pipeline.export.executorch.runtime import Decoder, Vision
from pipeline.export.executorch.vision import write_vision
from pipeline.export.mark import check_files, start_writing, write_mark, written_before
from pipeline.export.source import Source
from pipeline.models.files.checkpoint import copy_processor
from pipeline.models.loading import load_network

VISION, DECODER, CARD = "eyes.pte", "decoder.pte", "README.md"
LAYOUT = 1  # of these files: what an export of another number holds is written again


@dataclass(frozen=True)
class ExecutorchFolder:
    """What `export executorch` wrote. `mark` is the content of export.json."""

    path: Path
    mark: dict[str, Any]

    @property
    def has_decoder(self) -> bool:
        return DECODER in self.mark["files"]

    def check_files(self) -> None:
        """Raise `PipelineError` naming a file that is missing or not as it was written."""
        check_files(self.path, self.mark["files"])

    def vision(self) -> Vision:
        """Load the vision tower and projector."""
        return Vision(self.path / VISION)

    def decoder(self) -> Decoder:
        """Load the language model."""
        return Decoder(self.path / DECODER, context=self.mark["context"])


def write_executorch(
    source: Source,
    path: Path,
    *,
    decoder: bool = True,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> ExecutorchFolder:
    """Write `eyes.pte` and, where the family allows it and `decoder` asks for it, `decoder.pte`.

    Files of the same export are left as they are. Raises `ConfigError` for a tower that torch's exporter does not
    take, and if the folder holds another export, unless `overwrite`.
    """
    source.check_is_not(path)
    asked = {"layout": LAYOUT, "source_digest": source.digest, "other_digest": source.other_digest}
    asked |= {"decoder": decoder}
    names = (VISION, DECODER, CARD)
    found = written_before(path, asked, names, overwrite=overwrite)
    if found:
        say(f"{path}: written before from the same checkpoint; nothing was done")
        return ExecutorchFolder(path, found)
    inputs = Inputs(source)
    network = load_network(str(source.folder), dtype=torch.float32).eval()
    prompt = inputs.prompt("")
    start_writing(path, names)
    say(f"{path / VISION}: writing")
    write_vision(network, prompt, path / VISION)
    if decoder and (reason := why_not(source.config)):
        say(f"{path / DECODER}: not written: {reason}")
        decoder = False
    if decoder:
        say(f"{path / DECODER}: writing")
        write_decoder(network, path / DECODER)
    copy_processor(source.folder, path)
    programs = [VISION, DECODER] if decoder else [VISION]
    facts = _facts(source, inputs, prompt, decoder=decoder) | {"stops": stops_of(network)}
    return ExecutorchFolder(path, write_mark(path, asked | facts, programs))


def _facts(source: Source, inputs: Inputs, prompt: Prompt, *, decoder: bool) -> dict[str, Any]:
    """Return what a reader of the files must know."""
    text = source.config.get_text_config()
    return {
        "family": source.config.model_type,
        "pixel_values": list(prompt.pixels.shape),
        "picture": [inputs.side, inputs.side],
        "vision_tokens": [int(prompt.is_vision.sum()), text.hidden_size],
        "context": context_of(source.config) if decoder else None,
        "vocabulary": text.vocab_size,
    }


def stops_of(network: Any) -> list[int]:
    """Return the ids that end an answer."""
    stops = network.generation_config.eos_token_id
    stops = network.config.get_text_config().eos_token_id if stops is None else stops
    return [] if stops is None else list(stops) if isinstance(stops, list | tuple) else [stops]
