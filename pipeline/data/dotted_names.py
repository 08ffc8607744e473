"""Samples with dots in their names: by WebDataset's rule scan_1.5.json is a member of the sample scan_1."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace

from pipeline.data.decoding import ENDINGS
from pipeline.data.tars import MAX_MEMBER_BYTES, Group, read_member
from pipeline.errors import BadSample


def split_dotted(group: Group, tar: tarfile.TarFile) -> Iterator[Group]:
    """Yield the group's own members, if any, then each sample that a dot brought into it, as a bad one.

    KEY.meta.json and KEY.mask.png beside KEY.json are members of KEY.
    """
    stems = [ending.removesuffix(".json") for ending in group.members if _is_sample(ending, group, tar)]
    members: dict[str | None, dict[str, tarfile.TarInfo]] = {stem: {} for stem in (None, *stems)}
    for ending, member in group.members.items():
        owners = (stem for stem in stems if ending.startswith(f"{stem}."))
        members[max(owners, key=len, default=None)][ending] = member
    if own := members[None]:
        yield replace(group, members=own)
    for stem in stems:
        name = members[stem][f"{stem}.json"].name
        folder, slash, file = name.rpartition("/")
        better = file.removesuffix(".json").replace(".", "_") + ".json"
        problem = BadSample(
            "dots in the name",
            f"WebDataset reads {name} as the key {group.key} with the ending {stem}.json; rename it to "
            f"{folder}{slash}{better}, and what belongs to it likewise",
        )
        yield Group(f"{group.key}.{stem}", members[stem], group.problem or problem)


def _is_sample(ending: str, group: Group, tar: tarfile.TarFile) -> bool:
    """Return whether an ending such as 5.json is a sample's: it has a conversation, or an image beside it."""
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
