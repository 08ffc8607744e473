"""Captions as people have them: a CSV or TSV file, or a text beside each image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_packing import rejects_of, samples_of

from pipeline.errors import ConfigError, PackError
from pipeline.init.look import look
from pipeline.packing import text_tables
from pipeline.packing.pack import pack
from pipeline.packing.sources import open_source


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "pictures"
    (place / "sub").mkdir(parents=True)
    for name in ("0.png", "1.png", "sub/2.JPG"):
        Image.effect_noise((8, 6), 50).save(place / name)
    return place


def table(folder: Path, text: str | bytes, name: str = "captions.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def turns_of(output: Path) -> list[list[str]]:
    return [[turn["value"] for turn in sample.conversations] for sample in samples_of(output)]


def reasons_of(output: Path) -> list[str]:
    return [reject["reason"] for reject in rejects_of(output)]


@pytest.mark.parametrize("column", ["image", "file_name", "path", "Image", "filename", " image_path"])
@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_a_table_of_captions_is_packed_by_the_name_of_its_image_column(
    folder, tmp_path, column, ending, delimiter
):
    rows = [[column, "caption", "licence"], ["0.png", "A dog.", "CC0"], ["sub/2.JPG", "A cat.", ""]]
    path = table(folder, "\n".join(map(delimiter.join, rows)), f"captions.{ending}")
    summary = pack(path, tmp_path / "out")
    assert (summary.seen, summary.packed) == (2, 2)
    assert turns_of(tmp_path / "out") == [["<image>", "A dog."], ["<image>", "A cat."]]
    assert [sample.metadata["licence"] for sample in samples_of(tmp_path / "out")] == ["CC0", ""]


def test_a_byte_order_mark_line_breaks_and_quotes_are_read(folder, tmp_path):
    path = table(
        folder,
        b'\xef\xbb\xbfimage,question,answer\r\n0.png,"What, now?","Two\r\nlines"\r\n\r\n,"Is ""this"" text?",Yes\r\n',
    )
    pack(path, tmp_path / "out")
    assert turns_of(tmp_path / "out") == [["<image>What, now?", "Two\r\nlines"], ['Is "this" text?', "Yes"]]


def test_a_column_of_messages_holds_json(folder, tmp_path):
    messages = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    quoted = json.dumps(messages).replace('"', '""')
    pack(table(folder, f'image,messages\n0.png,"{quoted}"\n'), tmp_path / "out")
    assert turns_of(tmp_path / "out") == [["<image>Q", "A"]]


def test_bad_rows_are_listed_with_reasons_and_stop_nothing(folder, tmp_path):
    rows = [
        b"image,caption,label",
        b"0.png,A dog.,true",
        b"1.png,,",
        b",A cat.,",
        b"0.png,A dog,or two,",
        b"0.png",
        b"0.png,Gr\xfc\xdfe,",
        b"none.png,A dog.,",
        b"https://a.b/c.png,A dog.,",
        b"0.png,Wrong.,False",
    ]
    summary = pack(table(folder, b"\n".join(rows)), tmp_path / "out")
    assert (summary.seen, summary.packed, summary.rejected) == (9, 1, 8)
    assert sorted(reject["line"] for reject in rejects_of(tmp_path / "out")) == list(range(2, 10))
    assert {reason.partition(":")[0] for reason in reasons_of(tmp_path / "out")} == {
        "no text",
        "caption without an image",
        "row that does not fit the header",
        "text is not UTF-8",
        "missing image file",
        "image behind a URL",
        "answer that is marked as bad",
    }
    assert any("4 of 3 columns: 0.png | A dog | or two | " in r for r in reasons_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.png,A dog.\n", r"the first line must name the columns, .*; found 0.png, A dog.. Write a first line"),
        ("", r"found nothing"),
        ("image,caption,caption\n", r"has several columns caption; give each"),
        ('image,caption\n0.png,ok\n1.png,"never closed\n2.png,x\n', r"the row at line 3 is not valid: unexpected"),
        ('image,caption\n0.png,"a "red" dog"\n', r"the row at line 2 is not valid: .*Write a quote within"),
        ("image,caption\n".encode("utf-16"), r"is UTF-16, which is not read"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused_with_the_place(folder, tmp_path, text, complaint):
    with pytest.raises(PackError, match=complaint):
        pack(table(folder, text), tmp_path / "out")
    with pytest.raises(PackError, match=complaint):
        look(folder / "captions.csv")


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "MAX_FIELD", 1000)
    path = table(folder, 'image,caption\n0.png,"open' + "\n0.png,closed" * 1000)
    with pytest.raises(PackError, match=r"line 2 is not valid: field larger than field limit \(1000\)"):
        pack(path, tmp_path / "out")


# A text beside each image


def test_texts_beside_images_are_their_captions(folder, tmp_path):
    for name, text in (("0", "A dog.\n"), ("sub/2", "\ufeffTwo\nlines"), ("notes", "Nothing.")):
        (folder / f"{name}.txt").write_text(text)
    summary = pack(folder, tmp_path / "out")
    assert (summary.seen, summary.packed, summary.rejected) == (4, 2, 2)
    assert turns_of(tmp_path / "out") == [["<image>", "A dog."], ["<image>", "Two\nlines"]]
    assert [sample.metadata["id"] for sample in samples_of(tmp_path / "out")] == ["0.png", "sub/2.JPG"]
    assert sorted(reasons_of(tmp_path / "out")) == [
        "image without a text: 1.png: no .txt of the same name lies beside it",
        "text without an image: notes.txt: no image of the same name lies beside it",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b" \n", "text without a word: 0.txt: ''"),
        (b"0 0.5 0.5 0.2 0.1\n", "text without a word: 0.txt: '0 0.5"),
        (b"Gr\xfc\xdfe", "text is not UTF-8: 0.txt: "),
        (b"a" * (1 << 20) + b"b", "text too long: 0.txt, 1048577 bytes"),
    ],
)
def test_a_text_that_is_no_caption_is_listed(folder, tmp_path, text, reason):
    (folder / "0.txt").write_bytes(text)
    (folder / "1.txt").write_text("A cat.")
    summary = pack(folder, tmp_path / "out")
    assert (summary.packed, summary.rejected) == (1, 2)
    assert any(found.startswith(reason) for found in reasons_of(tmp_path / "out"))


def test_a_second_run_does_nothing_tries_repaired_images_and_refuses_other_texts(folder, tmp_path):
    (folder / "0.txt").write_text("A dog.")
    (folder / "1.txt").write_text("A cat.")
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(b"cut")
    said: list[str] = []
    assert pack(folder, tmp_path / "out", say=said.append).packed == 1
    assert pack(folder, tmp_path / "out", say=said.append).packed == 1
    assert "nothing was done" in said[-1]
    (folder / "1.png").write_bytes(good)
    assert pack(folder, tmp_path / "out", say=said.append).packed == 2
    (folder / "0.txt").write_text("A fox.")
    with pytest.raises(PackError, match="annotations"):
        pack(folder, tmp_path / "out")


def test_images_with_texts_and_a_table_are_no_folder_of_captions(folder):
    (folder / "0.txt").write_text("A dog.")
    assert look(folder).annotations == folder
    table(folder, "image,caption\n0.png,A cat.\n")
    found = look(folder)
    assert (found.annotations, found.form) == (folder / "captions.csv", "caption")


def test_what_is_found_says_its_form_and_where_its_images_lie(folder, tmp_path):
    (folder.parent / "lists").mkdir()
    path = table(folder.parent / "lists", "file_name,text\nsub/2.JPG,A cat.\n", "metadata.csv")
    found = look(tmp_path)
    assert (found.annotations, found.form, found.image_folder) == (path, "text", folder)
    assert not open_source(path).holds_images


def test_images_alone_are_not_enough(folder):
    with pytest.raises(ConfigError, match=r"nor images with a \.txt beside each"):
        look(folder)
