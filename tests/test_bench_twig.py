"""bench/twig.py, on a tiny base."""

from __future__ import annotations

import pytest

from bench import twig

pytestmark = pytest.mark.slow


def test_every_way_writes_the_same_text_unless_it_prunes(capsys):
    twig.main(size=["tiny"], new_tokens=6, repeats=1, batch=2, keep=0.4)
    lines = capsys.readouterr().out.splitlines()
    same = {
        line.rsplit(maxsplit=1)[-1]
        for line in lines
        if line.startswith(("base  ", "twig  ", "twig, short", "twig, tree"))
    }
    assert same == {"True"}
    assert sum(line.startswith(("base", "twig", "transformers")) for line in lines) == 9
