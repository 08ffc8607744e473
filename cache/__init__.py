"""The store: what a teacher computed, on the disk, by sample key. Knows arrays and files, never a model.

`__all__` is what is public and stays; docs/store.md describes it. The other names are for the rest of the house.
"""

# pyright: reportUnusedImport=false
from __future__ import annotations

import os

from cache.care.push import Pushed, card_at, push_store
from cache.care.repair import restore_manifest
from cache.care.subset import merge_stores, slice_store
from cache.care.summary import ArraySummary, PartSizes, Summary, part_sizes, summarise
from cache.care.verify import Report, verify
from cache.care.verify_part import Problem
from cache.differences import Difference
from cache.errors import (
    ArrayMismatch,
    CacheError,
    CorruptFile,
    CorruptPart,
    DuplicateKey,
    FingerprintMismatch,
    ForeignPart,
    FormatMismatch,
    HoldsFewer,
    KeyNotInStore,
    MisusedWriter,
    NotThere,
    PartConflict,
    PartLost,
    RefusedValue,
    SchemaError,
    StoreNotFound,
    StoreUnreachable,
    UnknownArray,
    UnknownPart,
    UnreadableFile,
    UnsafeName,
    UnsupportedFormat,
)
from cache.files.any_path import Range, RemotePath, any_path, find_ranges, local, read_file
from cache.files.durable import hash_file, replace_file, sync_directory
from cache.files.local_files import drop_from_memory
from cache.files.mirror import Mirror
from cache.files.remote_files import RemoteFile, find_files, has_ranges, is_glob, stat_files, stream_file
from cache.format.codec import Codec
from cache.format.codecs import CODECS
from cache.format.documents import digest_of
from cache.format.layout import FORMAT_VERSION
from cache.format.records import PartRecord
from cache.format.schema import ArraySpec, Fingerprint, Manifest, SampleEntry, Span
from cache.masking import MASK, without_secrets
from cache.read.reader import Store
from cache.write.part_writer import PartSummary, PartWriter
from cache.write.scratch import sweep_dead, sweep_old
from cache.write.taken_keys import TakenKeys
from cache.write.writer import StoreWriter

# The client of the Hub would otherwise send what it is used by; nothing here reports home.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__all__ = [
    "FORMAT_VERSION",
    "ArraySpec",
    "CacheError",
    "CorruptFile",
    "CorruptPart",
    "Fingerprint",
    "KeyNotInStore",
    "Manifest",
    "Mirror",
    "Report",
    "SampleEntry",
    "Span",
    "Store",
    "StoreNotFound",
    "StoreUnreachable",
    "UnknownArray",
    "UnknownPart",
    "UnreadableFile",
    "UnsupportedFormat",
    "verify",
]
