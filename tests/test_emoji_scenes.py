"""The emoji scenes: the truth of their questions, what each set may show, and the art that packages carry."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.studies.emoji.art import NAMES, SEEN_STYLES, STYLES, UNSEEN_STYLE, Art, read_art
from pipeline.studies.emoji.data import SETS, SceneSet, scenes_of, write_sets
from pipeline.studies.emoji.scenes import (
    BACKGROUNDS,
    CELL_SIZE,
    PLACES,
    QUESTIONS,
    Concept,
    Scene,
    Thing,
    all_concepts,
    ask,
)

CONCEPTS = all_concepts()
KINDS = {concept.kind for concept in CONCEPTS}
DOG, CAT, ROSE = (
    Concept("dog", "dog", "animal"),
    Concept("cat", "cat", "animal"),
    Concept("rose", "rose", "plant"),
)
SQUARE = '<path fill="#ff0000" d="M0 0h16v16H0z"/>'


def thing(concept: Concept, cell: int) -> Thing:
    return Thing(concept, cell, CELL_SIZE, cell % 2 * CELL_SIZE, cell // 2 * CELL_SIZE)


def answers(scene: Scene, concepts=(DOG, CAT, ROSE), seed: int = 0) -> dict[str, tuple[str, str]]:
    """Question type -> (question, answer)."""
    records = ask(random.Random(seed), scene, concepts, key="k", image="i.png")
    return {
        r["question_type"]: (
            r["conversations"][0]["value"].removeprefix("<image>\n"),
            r["conversations"][1]["value"],
        )
        for r in records
    }


def write_packs(folder: Path, *, labels: tuple[str, ...] = ("dog", "cat"), styles=STYLES) -> Path:
    """npm tarballs as small as they can be: one square is the drawing of every label in every style."""

    def pack(name: str, files: dict[str, object]) -> None:
        with tarfile.open(folder / f"{name}-1.0.0.tgz", "w:gz") as tar:
            for path, content in files.items():
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    codes = {label: f"1F{n:03X}-FE0F" for n, label in enumerate(("dog", "cat"))}
    pack(NAMES, {"en/data.json": [{"label": label, "hexcode": code} for label, code in codes.items()]})
    about = {"author": {"name": "A", "url": "a.org"}, "license": {"title": "L", "url": "l.org"}}
    for style in styles:
        icons = {"icons": {"square": {"body": SQUARE}}, "aliases": {"pet": {"parent": "square"}}, "width": 16}
        characters = {codes[label].lower().removesuffix("-fe0f"): "pet" for label in labels}
        pack(f"iconify-json-{style}", {"icons.json": icons, "chars.json": characters, "info.json": about})
    return folder


def test_names_are_unique_and_never_a_kind_a_place_or_a_colour():
    names = [concept.name for concept in CONCEPTS]
    taken = {*KINDS, *BACKGROUNDS, *PLACES, "yes", "no", "nothing"}
    assert len(names) == len(set(names)) == 228 and not taken & set(names)


def test_about_a_seventh_of_the_concepts_is_held_out_and_every_kind_has_both_sorts():
    held_out = Counter(concept.kind for concept in CONCEPTS if concept.held_out)
    assert sum(held_out.values()) == 31
    assert set(held_out) == {c.kind for c in CONCEPTS if not c.held_out} == KINDS


def test_every_question_about_a_scene_of_one_thing_has_its_true_answer():
    asked = answers(Scene("noto", "blue", (thing(DOG, 1),)))
    assert asked["name"] == ("What is at the top right?", "dog")
    assert asked["kind"] == ("What kind of thing is at the top right?", "animal")
    assert asked["place"] == ("Find the dog.", "top right")
    assert asked["count"] == ("How many things are there?", "1")
    assert asked["background"] == ("What colour is the background?", "blue")


def test_presence_is_asked_of_what_is_shown_and_of_what_is_not_half_the_time_each():
    scene = Scene("noto", "red", (thing(DOG, 0), thing(CAT, 3)))
    asked = [answers(scene, seed=seed)["presence"] for seed in range(200)]
    assert {question for question, answer in asked if answer == "no"} == {"Any rose here?"}
    assert {question for question, answer in asked if answer == "yes"} == {"Any dog here?", "Any cat here?"}
    assert 80 < sum(answer == "yes" for _, answer in asked) < 120


@pytest.mark.parametrize("name", SETS)
def test_a_set_shows_what_it_may_show_and_nothing_else(name: str):
    styles, held_out = set(), set()
    for image, scene, records in scenes_of(name, SETS[name]):
        styles.add(scene.style)
        held_out |= {thing.concept.held_out for thing in scene.things}
        cells = [thing.cell for thing in scene.things]
        assert 1 <= len(cells) == len(set(cells)) <= 4
        assert len({thing.concept for thing in scene.things}) == len(cells)
        assert image.startswith(f"{name}/") and scene.style in image
        assert [record["question_type"] for record in records] == list(QUESTIONS)
    assert styles == ({UNSEEN_STYLE} if name == "unseen_style" else set(SEEN_STYLES))
    assert held_out == {name == "unseen_concept"}


def test_no_answer_can_be_guessed_from_how_often_it_occurs():
    given: dict[str, Counter[str]] = {name: Counter() for name in QUESTIONS}
    for _, _, records in scenes_of("train", SETS["train"]):
        for record in records:
            given[record["question_type"]][record["conversations"][1]["value"]] += 1
    shares = {name: counts.most_common(1)[0][1] / counts.total() for name, counts in given.items()}
    limits = {"name": 0.02, "kind": 0.2, "place": 0.28, "presence": 0.53, "count": 0.28, "background": 0.13}
    assert all(shares[name] < limit for name, limit in limits.items()), shares


def test_the_same_set_is_the_same_scenes_each_time_and_no_two_sets_share_one():
    def first(name: str) -> list[Scene]:
        return [scene for _, scene, _ in scenes_of(name, SETS[name])][:50]

    assert first("train") == first("train")
    assert not {str(scene) for scene in first("train")} & {str(scene) for scene in first("new_scene")}


def test_a_pack_is_joined_to_the_names_through_aliases_and_its_size_kept(tmp_path):
    art = read_art(write_packs(tmp_path), [DOG, CAT])
    assert set(art.drawings) == {(name, style) for name in ("dog", "cat") for style in STYLES}
    assert (
        'viewBox="0 0 16 16"' in art.drawings["dog", "noto"] and SQUARE in art.drawings["cat", UNSEEN_STYLE]
    )
    assert all(f"- {style}: A, a.org. L, l.org" in art.licenses for style in STYLES)


def test_a_picture_is_its_background_with_the_emoji_where_the_scene_says(tmp_path):
    pytest.importorskip("resvg_py")
    art = read_art(write_packs(tmp_path), [DOG, CAT])
    scene = Scene("noto", "blue", (Thing(DOG, 3, 80, 140, 150),))
    image = art.paint(scene)
    assert image.size == (256, 256) and image.mode == "RGB"
    assert image.getpixel((180, 190)) == (255, 0, 0) and image.getpixel((139, 190)) == BACKGROUNDS["blue"]
    assert image.getpixel((219, 229)) == (255, 0, 0) and image.getpixel((220, 230)) == BACKGROUNDS["blue"]


def test_a_written_set_is_llava_records_beside_their_pictures(tmp_path):
    pytest.importorskip("resvg_py")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{SQUARE}</svg>'
    art = Art({(concept.name, style): svg for concept in CONCEPTS for style in STYLES}, "")
    write_sets({"tiny": SceneSet(3, seed=7)}, art=art, output=tmp_path)
    records = json.loads((tmp_path / "tiny.json").read_text())
    assert len({record["id"] for record in records}) == len(records) == 18
    assert all((tmp_path / "images" / record["image"]).is_file() for record in records)


def test_an_emoji_that_a_pack_lacks_is_named(tmp_path):
    with pytest.raises(ConfigError, match="the pack noto has no emoji 'cat'; use the versions"):
        read_art(write_packs(tmp_path, labels=("dog",)), [DOG, CAT])


def test_a_missing_pack_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match="one tarball of the npm package iconify-json-openmoji, found 0; run `make"
    ):
        read_art(write_packs(tmp_path, styles=("noto", "twemoji")), [DOG])


def test_a_damaged_pack_is_named(tmp_path):
    file = write_packs(tmp_path) / f"{NAMES}-1.0.0.tgz"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(
        ConfigError, match=r"emojibase-data-1.0.0.tgz: en/data.json cannot be read \(\w+\); remove"
    ):
        read_art(tmp_path, [DOG])


def test_drawing_without_the_rasteriser_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(
        ConfigError,
        match=r"drawing emoji needs the package resvg_py, which .*'alignkd\[emoji\]'`, or run `make emoji`$",
    ):
        Art({("dog", "noto"): "<svg/>"}, "").draw("dog", "noto", size=8)
