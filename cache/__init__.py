"""The store: what a teacher computed, on the disk, by sample key. Knows arrays and files, never a model."""

from __future__ import annotations

from cache.care.push import Pushed, card_at, push_store
from cache.care.repair import restore_manifest
from cache.care.subset import merge_stores, slice_store
from cache.care.summary import ArraySummary, PartSizes, Summary, part_sizes, summarise
from cache.care.verify import Report, verify
from cache.care.verify_part import Problem
from cache.differences import Difference, leaf_differences
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
from cache.files.local_files import drop_from_memory
from cache.files.mirror import Mirror
from cache.files.place import local
from cache.format.codecs import CODECS, Codec
from cache.format.documents import digest_of
from cache.format.layout import FORMAT_VERSION
from cache.format.records import PartRecord
from cache.format.schema import (
    ArraySpec,
    Fingerprint,
    Manifest,
    SampleEntry,
    Span,
)
from cache.read.reader import Store
from cache.write.part_writer import PartSummary, PartWriter
from cache.write.scratch import sweep_dead, sweep_old
from cache.write.taken_keys import TakenKeys
from cache.write.writer import StoreWriter

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
