"""The caches of each group of layers after every iteration: their lengths, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twig_models import TwigSpecimen, twig_specimen

from pipeline.twig.decoding.generate import Decoding, _Loop
from pipeline.twig.decoding.layer_group import LayerGroup
from pipeline.twig.decoding.session import Session
from pipeline.twig.geometry import Geometry

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(attach_layer=1, num_layers=2, wipe_layer=4, num_base_layers=6)
KEEP = 0.4


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    return twig_specimen("qwen2_5_vl", tmp_path_factory.mktemp("caches") / "base")


class Watched(_Loop):
    """A loop that shows its caches when an iteration is confirmed, before the newest token is read."""

    def _confirm(self, *arguments: Any) -> None:
        super()._confirm(*arguments)
        self.seen.append({name: group.length for name, group in self.all_groups().items()})
        self.held.append({name: self._content(group) for name, group in self.all_groups().items()})

    def all_groups(self) -> dict[str, LayerGroup]:
        assert self.session.own is not None
        return {**self.session.groups, "own": self.session.own}

    def _content(self, group: LayerGroup) -> list[tuple[Tensor, Tensor]]:
        return [
            (k[:, :, : group.length].clone(), v[:, :, : group.length].clone()) for k, v in group.held.values()
        ]

    def watch(self):
        self.seen: list[dict[str, int]] = []
        self.held: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
        with torch.inference_mode():
            return self.run()


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_lengths_after_every_iteration(specimen, keep, threshold):
    """twig.md 2: layers below K hold all; K to Kf-1 the kept vision tokens; from Kf on none; the twig holds all."""
    twig, prompts = specimen.twig(GEOMETRY), specimen.prompts([1])
    loop = Watched(specimen.base, twig, prompts, Decoding(16, keep=keep, delta=4, threshold=threshold), None)
    answers = loop.watch()
    num_vision, length = int(prompts.is_vision.sum()), prompts.length
    kept = num_vision if keep is None else GEOMETRY.num_kept(num_vision, keep)
    wiped = kept if keep is None else 0
    assert len(loop.seen) > 3
    done = 0
    for lengths in loop.seen:
        # The newest confirmed token is in the shallow layers alone.
        done = lengths["shallow"] - length
        assert 0 < done <= len(answers.tokens[0])
        assert lengths["middle"] == length - num_vision + kept + done - 1
        assert lengths["deep"] == length - num_vision + wiped + done - 1
        # The twig reads the newest token, and perhaps the last draft before it, when it drafts again.
        assert lengths["own"] in (length + done - 1, length + done - 2)


@pytest.mark.parametrize("keep", [None, KEEP])
def test_what_is_held_is_what_a_fresh_pass_over_the_confirmed_text_gives(specimen, keep):
    """A wrong crop or gather shows here at once."""
    twig, prompts = specimen.twig(GEOMETRY), specimen.prompts([0])
    loop = Watched(specimen.base, twig, prompts, Decoding(14, keep=keep, delta=3, threshold=0.3), None)
    tokens = loop.watch().tokens[0]
    for lengths, held in zip(loop.seen, loop.held, strict=True):
        done = lengths["shallow"] - prompts.length
        fresh = fresh_caches(specimen, twig, prompts, tokens[:done], keep)
        for name, content in held.items():
            for ours, theirs in zip(content, fresh[name], strict=True):
                for mine, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mine, other[:, :, : mine.shape[2]], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def fresh_caches(specimen, twig, prompts, tokens, keep) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Keys and values of every group, of prompts and tokens read in one pass each."""
    session = Session(specimen.base, twig, prompts, first=1, wipe=4, room=len(tokens) + 1)
    states = session.read_prompts()
    _, scores = session.read_with_twig(states)
    if keep is not None:
        count = GEOMETRY.num_kept(int(prompts.is_vision.sum()), keep)
        session.prune(scores, [count])
    rows = torch.arange(len(tokens))[None] + prompts.length
    following = session.read_tokens(torch.tensor([tokens]), rows)
    assert session.own is not None
    session.own.run(following, rows)
    session.verify([following], [rows])
    groups = {**session.groups, "own": session.own}
    return {
        name: [(k[:, :, : group.length], v[:, :, : group.length]) for k, v in group.held.values()]
        for name, group in groups.items()
    }


def test_a_ragged_batch_marks_rejected_drafts_as_nothing(specimen):
    """Samples accept different numbers of drafts: positions that one of them rejected hold nothing for it."""
    twig = specimen.twig(GEOMETRY)
    loop = Watched(specimen.base, twig, specimen.prompts([0, 1, 3]), Decoding(12, delta=4, threshold=0), None)
    answers = loop.watch()
    columns = loop.session.shallow.columns
    for sample, tokens in enumerate(answers.tokens):
        held = columns[sample][columns[sample] >= loop.prompts.length] - loop.prompts.length
        # In order, each once, from the first token on: what ended in the last iteration is not confirmed any more.
        assert held.tolist() == list(range(len(held))) and len(held) <= len(tokens) + 4
