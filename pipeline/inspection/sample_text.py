"""A stored sample as text for a terminal: its tokens, which of them are trained, and the teacher's answers."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from pipeline.inspection.sample import Inspection
from pipeline.inspection.token_text import visible
from pipeline.positions import IGNORE_INDEX

# Neighbouring tokens differ in style; brackets and arrows show the same without colour.
GIVEN = ("", "dim")
TRAINED = ("bold cyan", "bold blue")
IMAGE = "black on yellow"
SMALL_PRINT = "italic"
MOST_ANSWERS = 4


def describe_sample(inspection: Inspection) -> Text:
    """Return the sample token by token, in colour, then each trained token with the teacher's likeliest ones.

    A plain space divides tokens; "␣" and "↵" are spaces and line breaks of the text.
    """
    lines = [
        Text.assemble((inspection.key, "bold"), f" in {inspection.store}"),
        Text(_counts(inspection)),
        Text(),
        Text(" ").join(_tokens(inspection)),
        Text(),
        Text.assemble("»", ("trained", TRAINED[0]), "«  ", ("[image]", IMAGE), "  all else is given"),
    ]
    if inspection.note:
        lines.append(Text(f"Numbers are token ids, because there is no tokenizer: {inspection.note}."))
    return Text("\n").join([*lines, Text(), *_answers(inspection)])


def _counts(inspection: Inspection) -> str:
    num_images, length = len(inspection.images), len(inspection.input_ids)
    words = [f"{length - len(inspection.vision)} text tokens"]
    if num_images:
        sizes = sorted(set(inspection.sizes))
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        words.append(f"{num_images} {'image' if num_images == 1 else 'images'} of {each} vision tokens")
    return f"{', '.join(words)}: {length} positions; {len(inspection.answers)} tokens trained"


def _tokens(inspection: Inspection) -> Iterator[Text]:
    """Yield every token in its style, vision tokens as the positions of each run, an answer between arrows."""
    trained = [label != IGNORE_INDEX for label in inspection.labels]
    shown, vision, firsts = iter(_runs(inspection)), inspection.vision, _firsts(inspection)
    for place, token in enumerate(inspection.tokens):
        if place in vision:
            if place - 1 not in vision or place in firsts:
                yield Text(next(shown), IMAGE)
            continue
        begins = trained[place] and not trained[place - 1]
        ends = trained[place] and not any(trained[place + 1 : place + 2])
        style = (TRAINED if trained[place] else GIVEN)[place % 2]
        yield Text.assemble("»" * begins, (visible(token), style), "«" * ends)


def _firsts(inspection: Inspection) -> set[int]:
    """Return the position of each image's first vision token."""
    return {int(columns[0]) for columns in inspection.slots.by_image(inspection.slots.vision)}


def _runs(inspection: Inspection) -> Iterator[str]:
    """Yield what is shown for each run of vision tokens of one image: tiles are divided by text tokens."""
    for image, columns in enumerate(inspection.slots.by_image(inspection.slots.vision)):
        rows, across = inspection.grids[image]
        places = columns.tolist()
        starts = [n for n in range(len(places)) if n == 0 or places[n] != places[n - 1] + 1]
        for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
            count = f"{rows} x {across}" if len(starts) == 1 and rows else str(stop - start)
            yield f"[image {image + 1}: {count} vision tokens at {places[start]} to {places[stop - 1]}]"


def _answers(inspection: Inspection) -> Iterator[Text]:
    if not any(answer.likeliest for answer in inspection.answers):
        yield Text("The store has no logits, so the teacher's answers are not known.")
        return
    names = [visible(inspection.tokens[answer.place]) for answer in inspection.answers]
    width = max(len("trained"), *map(len, names))
    yield Text(f"{'trained'.ljust(width)}  the teacher's likeliest", style=SMALL_PRINT)
    for answer, name in zip(inspection.answers, names, strict=True):
        shown = [f"{visible(text)} {_percent(share)}" for text, share in answer.likeliest[:MOST_ANSWERS]]
        line = Text.assemble((name.ljust(width), TRAINED[0]), "  ", "  ".join(shown))
        if answer.likeliest[0][0] != inspection.tokens[answer.place]:
            line.append("  not what is trained", "bold magenta")
        yield line


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share >= 0.001 else "<0.1%"
