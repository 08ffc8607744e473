"""Trees of drafts: the text is that of the base, for every shape, family, batch and stop token."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from test_twig_caches import Watched, fresh_caches
from twig_models import (
    FAMILIES,
    TwigSpecimen,
    assert_pairs_follow_the_base,
    kept_by,
    oracle,
    oracle_logits,
    twig_specimen,
)

from pipeline.errors import ConfigError
from pipeline.twig.decoding.choosing import Greedy, Sampling
from pipeline.twig.decoding.drafting import SequenceDrafter
from pipeline.twig.decoding.faster import TRIED, TreeIfFaster
from pipeline.twig.decoding.generate import Decoding, answer
from pipeline.twig.decoding.session import Session
from pipeline.twig.decoding.tree import Growth, Tree
from pipeline.twig.decoding.tree_drafting import TreeDrafter, TreeDrafts
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

pytestmark = pytest.mark.slow

GEOMETRY = Geometry(attach_layer=1, num_layers=2, wipe_layer=4, num_base_layers=6)
KEEP = 0.5


class TakingTurns(TreeIfFaster):
    """A tree and a sequence by turns, and never a choice: whatever one leaves unread, the other reads."""

    def way(self):
        return min(self.paces, key=lambda way: self.paces[way].iterations)


SHAPES = (
    Tree(1, 1, 1, 1),
    Tree(1, 1, 4, 4),
    Tree(2, 2, 3, 5),
    Tree(),
    Tree(3, 1, 2, 7),
    Tree(nodes=1),
    Tree(depth=1),
    TakingTurns(Tree(2, 2, 3, 5)),
)


@pytest.fixture(scope="module", params=FAMILIES)
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    return twig_specimen(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> TwigSpecimen:
    """A base of one family whose last layers add little, so that a copied twig's longer paths are accepted, too."""
    made = twig_specimen("qwen2_5_vl", tmp_path_factory.mktemp("one") / "base")
    last: Any = made.base.layers[3:]
    with torch.no_grad():
        for layer in last:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    return made


def sure(one: TwigSpecimen) -> Twig:
    """Return a copied twig that is surer of its tokens than its base: its trees are narrow and deep."""
    twig = one.twig(GEOMETRY)
    with torch.no_grad():
        twig.norm.get_parameter("weight").mul_(6)
    return twig


@pytest.mark.parametrize("seed", [None, 1], ids=["copied", "random"])
def test_the_text_is_that_of_the_base_without_drafts(specimen, seed):
    """One prompt at a time, several images, a late image, text alone; pruned and not; any shape."""
    twig, stops = specimen.twig(GEOMETRY, seed=seed), specimen.stop_ids
    for number in range(specimen.num_prompts):
        prompts = specimen.prompts([number])
        for keep in (None, KEEP):
            kept = None if keep is None else kept_by(specimen, twig, prompts, keep)
            expected = oracle(specimen.base, prompts, kept, GEOMETRY, max_new_tokens=8, stop_ids=stops)
            for tree in SHAPES:
                made = answer(specimen.base, twig, prompts, Decoding(8, stops, keep, tree=tree))
                assert made.tokens == [expected], (number, keep, tree)


def test_a_batch_of_ragged_prompts_is_answered_as_each_alone(specimen):
    twig, stops = specimen.twig(GEOMETRY), specimen.stop_ids
    numbers = list(range(specimen.num_prompts))
    for keep in (None, KEEP):
        plain = Decoding(8, stops, keep, delta=0)
        alone = [answer(specimen.base, twig, specimen.prompts([n]), plain).tokens[0] for n in numbers]
        for tree in SHAPES:
            made = answer(specimen.base, twig, specimen.prompts(numbers), Decoding(8, stops, keep, tree=tree))
            assert made.tokens == alone, (keep, tree)


@pytest.mark.parametrize("most", [1, 2, 5, 7, 20])
def test_no_answer_is_longer_than_asked(one, most):
    twig, prompts = sure(one), one.prompts([0])
    expected = oracle(one.base, prompts, None, GEOMETRY, max_new_tokens=most)
    assert len(expected) == most
    for tree in SHAPES:
        assert answer(one.base, twig, prompts, Decoding(most, tree=tree)).tokens == [expected]


def test_an_answer_ends_with_the_first_stop_token_wherever_it_is(one):
    """Each token of an answer is the stop token once: first, inside a path, behind one."""
    twig, prompts = sure(one), one.prompts([1])
    whole = oracle(one.base, prompts, None, GEOMETRY, max_new_tokens=12)
    for token in whole:
        expected = whole[: whole.index(token) + 1]
        for tree in SHAPES:
            made = answer(one.base, twig, prompts, Decoding(12, frozenset([token]), tree=tree))
            assert made.tokens == [expected]


def test_one_child_of_one_node_makes_the_same_drafts_as_a_sequence(one):
    twig, prompts = one.twig(GEOMETRY), one.prompts([0])
    sequence = answer(one.base, twig, prompts, Decoding(30, delta=4, threshold=0))
    tree = answer(one.base, twig, prompts, Decoding(30, tree=Tree(1, 1, 4, 4)))
    assert 0 < sequence.accepted[0] < sequence.drafted[0]
    for name in ("tokens", "drafted", "accepted", "passes"):
        assert getattr(tree, name) == getattr(sequence, name)


def test_a_tree_and_a_sequence_by_turns_leave_each_other_what_was_not_read(one):
    """Where both make the same drafts, turns must not show: a twig that missed a token would draft worse."""
    twig, prompts = one.twig(GEOMETRY), one.prompts([0, 1, 3])
    sequence = answer(one.base, twig, prompts, Decoding(30, delta=4, threshold=0))
    turns = TakingTurns(Tree(1, 1, 4, 4))
    made = answer(one.base, twig, prompts, Decoding(30, delta=4, threshold=0, tree=turns))
    assert min(pace.iterations for pace in turns.paces.values()) > 1
    for name in ("tokens", "drafted", "accepted", "passes"):
        assert getattr(made, name) == getattr(sequence, name)


@pytest.mark.parametrize(("slow", "fast"), [("tree", "sequence"), ("sequence", "tree")])
def test_what_is_faster_goes_on_in_the_next_answers(one, monkeypatch, slow, fast):
    twig, prompts, measured = one.twig(GEOMETRY), one.prompts([0]), TreeIfFaster(Tree(2, 2, 3, 5))
    drafter = {"tree": TreeDrafter, "sequence": SequenceDrafter}[slow]
    draft = drafter.draft
    monkeypatch.setattr(drafter, "draft", lambda *arguments: time.sleep(0.1) or draft(*arguments))
    for _ in range(3):
        answer(one.base, twig, prompts, Decoding(20, tree=measured))
    assert measured.paces[slow].iterations == TRIED and measured.way() == fast
    assert measured.paces[fast].iterations > TRIED


def test_the_way_with_fewer_seconds_a_token_is_chosen_once_both_are_tried():
    measured, ways = TreeIfFaster(), []
    for _ in range(2 * TRIED):
        ways.append(measured.way())
        # A tree takes longer, and brings more still; the first iteration of each is not counted.
        first = measured.paces[ways[-1]].iterations == 0
        measured.paces[ways[-1]].add(
            99 if first else {"tree": 3, "sequence": 1}[ways[-1]], {"tree": 4, "sequence": 1}[ways[-1]]
        )
    assert ways == ["sequence", "tree"] * TRIED
    assert measured.way() == "tree" and measured.paces["tree"].seconds_a_token == 0.75
    measured.paces["tree"].add(30, 1)
    assert measured.way() == "sequence"


def test_a_tree_accepts_more_than_a_sequence_of_its_depth(one):
    """Otherwise the tests of exactness would test paths along the first children alone."""
    twig, prompts = one.twig(GEOMETRY), one.prompts([0])
    sequence = answer(one.base, twig, prompts, Decoding(40, delta=4, threshold=0))
    tree = answer(one.base, twig, prompts, Decoding(40, tree=Tree()))
    assert tree.tokens == sequence.tokens and tree.passes[0] < sequence.passes[0]


# Nodes


class Looking(TreeDrafter):
    """A drafter that keeps what it drafted."""

    def draft(self, *arguments) -> TreeDrafts:
        self.made = super().draft(*arguments)
        return self.made


@torch.inference_mode()
def grown(one: TwigSpecimen, tree: Tree, *, limit: int = 9, stop_ids: frozenset[int] = frozenset()):
    """Return a session of the first prompt, its tree, and the base's logits at the root and at every node."""
    twig, prompts = one.twig(GEOMETRY), one.prompts([0])
    session = Session(one.base, twig, prompts, first=1, wipe=4, room=limit + 1)
    drafter = TreeDrafter(session, Greedy(), tree, stop_ids)
    drafter.output, _ = session.read_with_twig(session.read_prompts())
    drafts = drafter.draft([[]], [prompts.length], [limit])
    return twig, prompts, drafts, session.verify(drafts.states, drafts.rows, drafts.visible)[0]


def tokens_of(node) -> list[int]:
    return [of_path.token for of_path in reversed(list(node.path()))]


@pytest.mark.parametrize("tree", [Tree(), Tree(2, 2, 3, 5), Tree(3, 3, 4, 40)])
def test_the_logits_of_a_node_are_those_of_its_path_alone(specimen, tree):
    _, prompts, drafts, logits = grown(specimen, tree)
    for node in drafts.chosen[0][::3]:
        if (path := tokens_of(node)) and specimen.stop_ids.isdisjoint(path):
            expected = oracle_logits(specimen.base, prompts, path, None, GEOMETRY)[-1]
            torch.testing.assert_close(logits[node.place + 1], expected, atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_nodes_are_those_of_a_search_without_a_cache(one):
    """All nodes of every level scored by the twig over each path alone; the most probable ones are chosen."""
    tree = Tree(children=3, expanded=2, depth=3, nodes=9)
    twig, prompts, drafts, _ = grown(one, tree)

    def children(path: list[int]) -> list[tuple[int, float]]:
        session = Session(one.base, twig, prompts, first=1, wipe=4, room=len(path) + 1)
        output, _ = session.read_with_twig(session.read_prompts())
        assert session.own is not None
        if path:
            rows = torch.arange(len(path))[None] + prompts.length
            output = session.own.run(session.read_tokens(torch.tensor([path]), rows), rows)[:, -1]
        values, ids = twig.logits(output)[0].log_softmax(-1).topk(tree.children)
        return list(zip(ids.tolist(), values.tolist(), strict=True))

    level = [([], 0.0)]
    candidates = []
    for _ in range(tree.depth):
        level = [([*path, t], score + value) for path, score in level for t, value in children(path)]
        candidates += level
        level = sorted(level, key=lambda one: -one[1])[: tree.expanded]
    expected = sorted(candidates, key=lambda one: -one[1])[: tree.nodes]
    found = [(tokens_of(node), node.score) for node in drafts.chosen[0]]
    assert [path for path, _ in found] == [path for path, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_every_node_stands_behind_its_parent_and_sees_its_ancestors_alone(one):
    _, prompts, drafts, _ = grown(one, Tree())
    nodes = drafts.chosen[0]
    assert drafts.visible is not None and len(nodes) == 60 and max(node.depth for node in nodes) > 1
    for place, node in enumerate(nodes):
        assert node.place == place and all(nodes[other.place] is other for other in node.path())
        assert node.parent is None or node.parent.place < place
        assert int(drafts.rows[0][0, place]) == prompts.length + node.depth - 1
        seen = drafts.visible[0, place].nonzero()[:, 0].tolist()
        assert seen == sorted(other.place for other in node.path())


def test_a_node_deeper_than_what_is_left_is_never_made(one):
    for limit in (1, 2, 3):
        _, _, drafts, _ = grown(one, Tree(nodes=1000), limit=limit)
        assert max(node.depth for node in drafts.chosen[0]) == limit


def test_a_stop_token_has_no_children(one):
    _, _, drafts, _ = grown(one, Tree())
    parent = next(node.parent for node in drafts.chosen[0] if node.parent is not None)
    _, _, stopped, _ = grown(one, Tree(), stop_ids=frozenset([parent.token]))
    assert any(node.token == parent.token for node in stopped.chosen[0])
    parents = [node.parent for node in stopped.chosen[0] if node.parent is not None]
    assert parents and all(node.token != parent.token for node in parents)


def test_a_parent_comes_before_its_equally_probable_children():
    """Probabilities that round to 1 tie a whole path; one that rounds to more does not overtake its parent."""
    one = Growth()
    one.add([None], [[1, 2]], [[-0.5, 0.0]])
    for _ in range(3):
        one.add(one.expandable(1, ()), [[3, 4]], [[1e-7, 0.0]])
    assert [node.score for node in one.chosen(5)] == [0.0] * 5
    for most in range(1, 9):
        chosen = one.chosen(most)
        assert all(other in chosen[: n + 1] for n, node in enumerate(chosen) for other in node.path())


def test_a_token_that_cannot_be_drawn_is_no_node():
    one = Growth()
    one.add([None], [[1, 2, 3]], [[-0.5, float("-inf"), float("nan")]])
    assert [node.token for node in one.nodes] == [1]


def test_a_short_head_drafts_its_tokens_alone_and_changes_no_text(one):
    twig, prompts = one.twig(GEOMETRY), one.prompts([0])
    expected = oracle(one.base, prompts, None, GEOMETRY, max_new_tokens=12)
    every = torch.arange(one.base.vocab_size)
    twig.shorten(every[~torch.isin(every, torch.tensor(expected))])
    none = answer(one.base, twig, prompts, Decoding(12, tree=Tree()))
    assert none.tokens == [expected] and none.accepted == [0] and none.drafted[0] > 0
    twig.shorten(torch.tensor(sorted(set(expected))))  # fewer than a node's children, perhaps
    some = answer(one.base, twig, prompts, Decoding(12, tree=Tree()))
    assert some.tokens == [expected] and some.accepted[0] > 0


# Caches


@pytest.mark.parametrize("keep", [None, KEEP])
@pytest.mark.parametrize("tree", [Tree(), Tree(2, 2, 3, 5), Tree(nodes=1)])
def test_what_is_held_is_what_a_fresh_pass_over_the_confirmed_text_gives(one, keep, tree):
    """Lengths and contents after every iteration: a wrong gather shows here at once."""
    twig, prompts = sure(one), one.prompts([0])
    loop = Watched(one.base, twig, prompts, Decoding(14, keep=keep, tree=tree), None)
    answers = loop.watch()
    num_vision, length = int(prompts.is_vision.sum()), prompts.length
    kept = num_vision if keep is None else GEOMETRY.num_kept(num_vision, keep)
    wiped = kept if keep is None else 0
    confirmed = [lengths["shallow"] - length for lengths in loop.seen]
    new = [after - before for before, after in zip([0, *confirmed], confirmed, strict=False)]
    # Paths of several lengths are accepted, and the base's own token behind each.
    assert len(set(new)) > 1 and max(new) > min(2, tree.nodes)
    before = 0
    for lengths, held in zip(loop.seen, loop.held, strict=True):
        done = lengths["shallow"] - length
        # The newest confirmed token is in the shallow layers alone; the twig reads what it confirms when it drafts.
        assert lengths["middle"] == length - num_vision + kept + done - 1
        assert lengths["deep"] == length - num_vision + wiped + done - 1
        assert lengths["own"] == length + before
        before = done
        fresh = fresh_caches(one, twig, prompts, answers.tokens[0][:done], keep)
        for name, content in held.items():
            for ours, theirs in zip(content, fresh[name], strict=True):
                for mine, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mine, other[:, :, : mine.shape[2]], atol=2e-5, rtol=1e-4)


class Confirmed(Watched):
    """A loop that shows the columns of its caches after the last iteration that was confirmed."""

    def _confirm(self, *arguments) -> None:
        super()._confirm(*arguments)
        self.columns = [group.columns for group in self.session.groups.values()]


@pytest.mark.parametrize("tree", [Tree(), TakingTurns(Tree(2, 2, 3, 5))])
def test_a_ragged_batch_holds_every_confirmed_token_once(one, tree):
    twig = sure(one)
    loop = Confirmed(one.base, twig, one.prompts([0, 1, 3]), Decoding(12, tree=tree), None)
    answers = loop.watch()
    assert len({*answers.accepted}) > 1
    for columns in loop.columns:
        for of_sample in columns:
            held = of_sample[of_sample >= loop.prompts.length] - loop.prompts.length
            assert held.tolist() == list(range(len(held))) and len(held) > 3


# Sampling, and what is refused


@pytest.mark.parametrize("tree", [Tree(2, 2, 2, 5), TakingTurns(Tree(2, 2, 2, 5))])
def test_sampling_keeps_the_distribution(one, tree):
    """Two tokens drawn along a tree: their pairs follow the base's own probabilities (chi-square)."""
    base, twig, prompts = one.base, one.twig(GEOMETRY), one.prompts([0])
    generator = torch.Generator().manual_seed(0)

    def peaked(scores: torch.Tensor) -> torch.Tensor:
        largest = scores.topk(3).values[..., -1:]
        return (2 * scores).masked_fill(scores < largest, float("-inf"))

    how = Decoding(3, tree=tree, choice=Sampling(peaked, generator))
    assert_pairs_follow_the_base(
        base, prompts, GEOMETRY, peaked, lambda: answer(base, twig, prompts, how), draws=800
    )


@pytest.mark.parametrize("name", ["children", "expanded", "depth", "nodes"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_tree_of_nothing_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"tree: {name}"):
        Tree(**{name: value})


def test_a_tree_and_looking_up_are_refused_together():
    with pytest.raises(ConfigError, match="look_up"):
        Decoding(4, tree=Tree(), look_up=2)
    with pytest.raises(ConfigError, match="delta: 0"):
        Decoding(4, delta=0, tree=TreeIfFaster())
    with pytest.raises(ConfigError, match="tree: expected"):
        Decoding(4, tree=4)  # pyright: ignore[reportArgumentType]


def test_a_tree_needs_a_twig(one):
    with pytest.raises(ConfigError, match="without a twig"):
        answer(one.base, None, one.prompts([0]), Decoding(4, delta=0, tree=Tree()))
