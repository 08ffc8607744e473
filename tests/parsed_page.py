"""A report page read strictly, for the tests: every element closed in its order; words, tags and table rows."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pipeline.report.gather import gather
from pipeline.report.page import render_page

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """`text` has one space between words; `rows` are the cells of every table row."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join("".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self._words.append(data)
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.rows[-1][-1] += data.strip()

    def row(self, start: str, *, nth: int = 0) -> list[str]:
        """The cells of the nth table row that starts with these words."""
        return [row for row in self.rows if row and row[0] == start][nth]


def page_of(folder: Path) -> Page:
    return Page(render_page(gather(folder)))
