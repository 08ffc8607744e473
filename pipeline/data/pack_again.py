"""Packing again over a finished pack: the new one is written beside it, and takes its place when it is whole.

Until then the old one stays, so packing again needs twice the room. The rename of `again.unfinished` to
`again.finished` decides: whatever ends the run before leaves the old pack, and after it the next run completes
the new one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.pack_folder import FINISHED, REJECTS, UNFINISHED, shards_in
from pipeline.data.shard_writer import sync_folder
from pipeline.data.tars import open_tar, read_members
from pipeline.errors import PackError, ShardError

BEGUN = "again.unfinished"
READY = "again.finished"


def settle(output: Path) -> bool:
    """Complete the replacement that a run was killed in, and remove what an unfinished one left.

    Gives whether there was one to complete.
    """
    if (output / BEGUN).is_dir():
        shutil.rmtree(output / BEGUN)
    if not (output / READY).is_dir():
        return False
    _move_in(output / READY, output)
    return True


@contextmanager
def replacing(output: Path, *, again: bool, allow_fewer: bool) -> Iterator[Path]:
    """Give the folder to pack into: `output`, or to pack again over a finished pack, one whose pack replaces it.

    Raises `PackError`, and leaves the old pack as it is, if the new one holds fewer samples.
    """
    if not (again and (output / FINISHED).is_file()):
        yield output
        return
    try:
        yield output / BEGUN
        if not allow_fewer:
            _check_not_fewer(output)
    except BaseException:
        # The shards are large; the list of rejects beside them stays to be read.
        for path in shards_in(output / BEGUN):
            path.unlink()
        raise
    os.rename(output / BEGUN, output / READY)
    sync_folder(output)
    _move_in(output / READY, output)


def _check_not_fewer(output: Path) -> None:
    old, new = _num_packed(output), _num_packed(output / BEGUN)
    if new < old:
        raise PackError(
            f"{output} is left as it is: it holds {old} samples, and packed again it would hold {new}; "
            f"{output / BEGUN / REJECTS} lists what was rejected, and --again --allow-fewer replaces it all the same."
        )


def _move_in(ready: Path, output: Path) -> None:
    """Can be begun anew wherever it ended: `pack.json` moves last, and what has moved is not looked for again."""
    if (ready / FINISHED).is_file():
        names = {shard["name"] for shard in json.loads((ready / FINISHED).read_bytes())["shards"]}
        for path in shards_in(output):
            if path.name not in names:
                path.unlink()
        for path in ready.iterdir():
            if path.name != FINISHED:
                os.replace(path, output / path.name)
        (output / UNFINISHED).unlink(missing_ok=True)
        sync_folder(output)
        os.replace(ready / FINISHED, output / FINISHED)
        sync_folder(output)
    ready.rmdir()


def _num_packed(folder: Path) -> int:
    try:
        return int(json.loads((folder / FINISHED).read_bytes())["summary"]["packed"])
    except (ValueError, KeyError, TypeError):  # damaged: the shards say it, too
        return sum(_num_samples(path) for path in shards_in(folder))


def _num_samples(path: Path) -> int:
    """Samples of a shard of ours, each of which has one JSON member, up to where it is damaged."""
    found = 0
    try:
        with open_tar(path) as tar:
            for member in read_members(tar, path):
                found += member.name.endswith(".json")
    except ShardError:
        pass
    return found
