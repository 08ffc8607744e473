"""The store: what a teacher computed, on the disk, by sample key. Knows arrays and files, never a model."""

from __future__ import annotations

from cache.codecs import CODECS, Codec
from cache.differences import Difference, leaf_differences
from cache.documents import digest_of
from cache.errors import (
    ArrayMismatch,
    CacheError,
    CorruptFile,
    CorruptPart,
    CountMismatch,
    DuplicateImage,
    DuplicateKey,
    FingerprintMismatch,
    ForeignPart,
    HoldsFewer,
    KeyNotInStore,
    NonFiniteValue,
    NotThere,
    PartClosed,
    PartConflict,
    PartLost,
    RefusedValue,
    SchemaError,
    StoreNotFound,
    StoreUnreachable,
    UnknownArray,
    UnknownImage,
    UnknownPart,
    UnplannedPart,
    UnreadableFile,
    UnsafeName,
    UnsupportedFormat,
    ValueOutOfRange,
)
from cache.layout import FORMAT_VERSION
from cache.local_files import drop_from_memory
from cache.mirror import Mirror
from cache.part_writer import PartSummary, PartWriter
from cache.place import local
from cache.push import Pushed, card_at, push_store
from cache.reader import Store
from cache.records import PartRecord
from cache.repair import restore_manifest
from cache.schema import (
    ArraySpec,
    Fingerprint,
    Manifest,
    SampleEntry,
    Span,
)
from cache.scratch import sweep_dead, sweep_old
from cache.subset import merge_stores, slice_store
from cache.summary import ArraySummary, PartSizes, Summary, part_sizes, summarise
from cache.taken_keys import TakenKeys
from cache.verify import Report, verify
from cache.verify_part import Problem
from cache.writer import StoreWriter

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "ArrayMismatch",
    "ArraySpec",
    "ArraySummary",
    "CacheError",
    "Codec",
    "CorruptFile",
    "CorruptPart",
    "CountMismatch",
    "Difference",
    "DuplicateImage",
    "DuplicateKey",
    "Fingerprint",
    "FingerprintMismatch",
    "ForeignPart",
    "HoldsFewer",
    "KeyNotInStore",
    "Manifest",
    "Mirror",
    "NonFiniteValue",
    "NotThere",
    "PartClosed",
    "PartConflict",
    "PartLost",
    "PartRecord",
    "PartSizes",
    "PartSummary",
    "PartWriter",
    "Problem",
    "Pushed",
    "RefusedValue",
    "Report",
    "SampleEntry",
    "SchemaError",
    "Span",
    "Store",
    "StoreNotFound",
    "StoreUnreachable",
    "StoreWriter",
    "Summary",
    "TakenKeys",
    "UnknownArray",
    "UnknownImage",
    "UnknownPart",
    "UnplannedPart",
    "UnreadableFile",
    "UnsafeName",
    "UnsupportedFormat",
    "ValueOutOfRange",
    "card_at",
    "digest_of",
    "drop_from_memory",
    "leaf_differences",
    "local",
    "merge_stores",
    "part_sizes",
    "push_store",
    "restore_manifest",
    "slice_store",
    "summarise",
    "sweep_dead",
    "sweep_old",
    "verify",
]
