"""Samples with dots in their names, which WebDataset's rule makes members of another: scan_1.5.json is scan_1's."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.decoding import ENDINGS
from pipeline.data.tars import MAX_MEMBER_BYTES, Group, read_member
from pipeline.errors import BadSample


def split_dotted(group: Group, tar: tarfile.TarFile) -> Iterator[Group]:
    """The group without what its names' dots brought in, if anything is left, then each such sample as a bad one.

    KEY.meta.json and KEY.mask.png beside KEY.json stay members of KEY.
    """
    stems = [ending.removesuffix(".json") for ending in group.members if _is_sample(ending, group, tar)]
    owners = {ending: _owner(ending, stems) for ending in group.members}
    own = {ending: member for ending, member in group.members.items() if owners[ending] is None}
    if own:
        yield replace(group, members=own)
    for stem in stems:
        members = {ending: member for ending, member in group.members.items() if owners[ending] == stem}
        problem = group.problem or _problem(group.key, f"{stem}.json", members[f"{stem}.json"].name)
        yield Group(f"{group.key}.{stem}", members, problem)


def _is_sample(ending: str, group: Group, tar: tarfile.TarFile) -> bool:
    """Whether an ending such as 5.json is that of a sample of its own: by a conversation, or an image beside it."""
    stem, dot, last = ending.rpartition(".")
    if not dot or last != "json":
        return False
    kinds = {other.rpartition(".")[2] for other in group.members if other.startswith(f"{stem}.")}
    if "json" not in group.members and kinds & ENDINGS:
        return True
    member = group.members[ending]
    try:
        found = json.loads(read_member(tar, member)) if member.size <= MAX_MEMBER_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "conversations" in found


def _owner(ending: str, stems: list[str]) -> str | None:
    return max((stem for stem in stems if ending.startswith(f"{stem}.")), key=len, default=None)


def _problem(key: str, ending: str, name: str) -> BadSample:
    folder, slash, file = name.rpartition("/")
    better = file[: -len(".json")].replace(".", "_") + ".json"
    return BadSample(
        "dots in the name",
        f"WebDataset reads {name} as the key {key} with the ending {ending}; rename it to {folder}{slash}{better}, "
        "and what belongs to it likewise",
    )
