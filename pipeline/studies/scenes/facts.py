"""The facts that a text about a scene states, and how many of a reference's facts an answer has."""

from __future__ import annotations

import re

# What a fact is about (`background`, `count`, or a place such as `top left`), and what the text says of it.
Fact = tuple[str, str]

OPENING = re.compile(r"a (\w+) picture with (\w+) things\.")
SENTENCE = re.compile(r"in the (\w+ \w+) cell \w+ the (\w+),")


def facts_of(text: str) -> frozenset[Fact]:
    """Return the background, the count, and what is in which place, as far as the text states them."""
    openings = (zip(("background", "count"), found, strict=True) for found in OPENING.findall(text))
    return frozenset([*SENTENCE.findall(text), *(fact for opening in openings for fact in opening)])


def recall(answer: str, reference: str) -> float:
    """Return the share of the reference's facts that the answer states, from 0 to 1.

    A reference that states no facts, such as one word, counts as one fact: the text itself.
    """
    wanted = facts_of(reference)
    if not wanted:
        return float(answer.strip() == reference.strip())
    return len(wanted & facts_of(answer)) / len(wanted)


def precision(answer: str, reference: str) -> float:
    """Return the share of the answer's facts that the reference states; 0 for an answer that states none."""
    return recall(reference, answer) if facts_of(answer) else float(answer.strip() == reference.strip())
