"""VQA accuracy: answers normalised as the VQA challenge does, compared with those of ten people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(DIGITS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# As published: the first is meant as a look behind, but reads "not after `<=` and a digit".
FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
MOST_STOPS = int(re.UNICODE)  # published: the flag stands where `re.sub` takes the number of replacements
MOST_AGREEING = 3

# Words that get an apostrophe, by what follows in the published table.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could I might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what who why you".replace("who ", ""),
    "'s": "he how somebody someone that there what when where who why",
}


def _contractions() -> dict[str, str]:
    """Return word without apostrophe -> word with it."""
    made = {
        (stem + ending).replace("'", ""): stem + ending
        for ending, stems in _ENDINGS.items()
        for stem in stems.split()
    }
    have = ("could", "had", "might", "should", "would")
    for stem in have:  # "couldnt've" and "couldn'tve"
        whole = f"{stem}n't've"
        made |= {f"{stem}nt've": whole, f"{stem}n'tve": whole}
    for stem in (
        "he",
        "it",
        "she",
        "somebody",
        "someone",
        "something",
        "there",
        "they",
        "we",
        "who",
        "you",
        "I",
    ):
        whole = f"{stem}'d've"
        made |= {f"{stem}d've": whole, f"{stem}'dve": whole}
    return made | _OTHERS


# Those that follow no rule, one of them backwards, as published.
_OTHERS = {
    "Im": "I'm",
    "let's": "let's",
    "maam": "ma'am",
    "oclock": "o'clock",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
CONTRACTIONS = _contractions()


def normalised(answer: str) -> str:
    """Return an answer in lower case without articles and punctuation, numbers up to ten as digits."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = _without_punctuation(text).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """Return a text in which a mark becomes a space, or nothing if it stands beside a space anywhere."""
    made = text
    for mark in PUNCTUATION:
        made = made.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return FULL_STOP.sub("", made, count=MOST_STOPS)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the mean over the people left out of min(1, others who gave this answer / 3)."""
    given = Counter(map(normalised, references))
    agreeing, people = given[normalised(answer)], len(references)
    if not agreeing:
        return 0.0
    of_others = agreeing * min(1.0, (agreeing - 1) / MOST_AGREEING)
    return (of_others + (people - agreeing) * min(1.0, agreeing / MOST_AGREEING)) / people
