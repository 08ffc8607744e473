"""`pack --again` over a finished pack: the new pack is written beside the old one and replaces it when finished.

This needs twice the disk space. The rename of `again.unfinished` to `again.finished` is the point of no return: a run
that ends before it leaves the old pack, and after it the next run completes the replacement.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache import sync_directory
from pipeline.data.tars import open_tar, read_members
from pipeline.errors import PackError, ShardError
from pipeline.packing.folder import FINISHED, REJECTS, UNFINISHED, shards_in

BEGUN = "again.unfinished"
READY = "again.finished"


def settle(output: Path) -> bool:
    """Remove an unfinished replacement; complete a finished one and return True."""
    if (output / BEGUN).is_dir():
        shutil.rmtree(output / BEGUN)
    if not (output / READY).is_dir():
        return False
    _move_in(output / READY, output)
    return True


@contextmanager
def replacing(output: Path, *, again: bool, allow_fewer: bool) -> Iterator[Path]:
    """Yield the folder to pack into: `output`, or a folder whose pack then replaces the finished one in `output`.

    Raises `PackError`, and keeps the old pack, if the new one holds fewer samples.
    """
    if not (again and (output / FINISHED).is_file()):
        yield output
        return
    try:
        yield output / BEGUN
        # With `allow_fewer` the old pack is not even read: it may be beyond reading.
        if not allow_fewer and (new := _num_packed(output / BEGUN)) < (old := _num_packed(output)):
            raise PackError(
                f"{output} is left as it is: it holds {old} samples, and packed again it would hold {new}; "
                f"{output / BEGUN / REJECTS} lists what was rejected, and --again --allow-fewer replaces it all the "
                "same."
            )
    except BaseException:
        # The shards are large. The list of rejects beside them stays, to be read.
        for path in shards_in(output / BEGUN):
            path.unlink()
        raise
    os.rename(output / BEGUN, output / READY)
    sync_directory(output)
    _move_in(output / READY, output)


def _move_in(ready: Path, output: Path) -> None:
    """Move a new pack over the old one. It can be repeated after any interruption: `pack.json` moves last."""
    if (ready / FINISHED).is_file():
        names = {shard["name"] for shard in json.loads((ready / FINISHED).read_bytes())["shards"]}
        for path in shards_in(output):
            if path.name not in names:
                path.unlink()
        for path in ready.iterdir():
            if path.name != FINISHED:
                os.replace(path, output / path.name)
        (output / UNFINISHED).unlink(missing_ok=True)
        sync_directory(output)
        os.replace(ready / FINISHED, output / FINISHED)
        sync_directory(output)
    ready.rmdir()


def _num_packed(folder: Path) -> int:
    """Return the samples of a pack; where `pack.json` is damaged, by the JSON members of its readable shards."""
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads((folder / FINISHED).read_bytes())["summary"]["packed"])
    found = 0
    for path in shards_in(folder):
        with suppress(ShardError), open_tar(path) as tar:
            for member in read_members(tar, path):
                found += member.name.endswith(".json")
    return found
