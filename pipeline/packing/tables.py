"""Rows of Parquet and Arrow files, a few at a time.

The `datasets` library reads row groups ahead, which are gigabytes where rows hold images, and maps Arrow files into
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, cast

import fsspec

TABLES = (".parquet", ".arrow")
ROWS = 32  # in memory at once; of Parquet also the page that holds them
BUFFER = 4 << 20  # bytes read at once of a column, which may lie on a server


def read_tables(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of files on this machine or behind URLs, with images as bytes."""
    for file in files:
        # A server is asked for what is read, and not for what follows it in another column.
        read = _read_parquet if file.lower().endswith(".parquet") else _read_arrow
        with fsspec.open(file, "rb", **({"cache_type": "none"} if "://" in file else {})) as opened:
            yield from read(cast(BinaryIO, opened))


def with_encoded_media(features: Any) -> Any:
    """Return the features of a data set that decodes JSON, but leaves images, sounds and the like as bytes."""
    return type(features).from_dict(_encoded(features.to_dict()))


def _encoded(feature: Any) -> Any:
    import datasets.features

    if isinstance(feature, list):
        return [_encoded(part) for part in feature]
    if not isinstance(feature, dict):
        return feature
    inner = {name: _encoded(part) for name, part in feature.items()}
    kind = getattr(datasets.features, str(feature.get("_type")), None)
    is_media = hasattr(kind, "decode_example") and feature["_type"] != "Json"
    return inner | {"decode": False} if is_media else inner


def _read_parquet(opened: BinaryIO) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(opened, buffer_size=BUFFER, pre_buffer=False)
    yield from _rows(table.schema_arrow, table.iter_batches(ROWS, use_threads=False))


def _read_arrow(opened: BinaryIO) -> Iterator[dict[str, Any]]:
    """Read a file that `datasets` wrote, a stream of batches, or one of Arrow's own format. Maps none into memory."""
    import pyarrow.ipc

    try:
        reader = pyarrow.ipc.open_stream(opened)
        batches = iter(reader)
    except pyarrow.ArrowInvalid:
        reader = pyarrow.ipc.open_file(opened)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    yield from _rows(reader.schema, batches)


def _rows(schema: Any, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    from datasets import Features

    features = with_encoded_media(Features.from_arrow_schema(schema))
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            yield from map(features.decode_example, batch.slice(start, ROWS).to_pylist())
