"""The first bytes of `PREFIX.idx`, read without numpy: a login node may lack it.

Layout of the index (megatron-core 0.11 to 0.19, core/datasets/indexed_dataset.py), little-endian:
9 bytes magic, u64 version 1, u8 dtype code, u64 sequences, u64 document boundaries, then i32 length of each
sequence, i64 byte offset of each sequence, i64 index of the sequence at which each document starts (with the end).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
LENGTH_BYTES = 4
"""Of each sequence's length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexHeader:
    """What the first 34 bytes of an index say."""

    dtype_code: int
    num_sequences: int
    num_documents: int

    @property
    def index_bytes(self) -> int:
        """Size the index file must have."""
        return HEADER.size + 12 * self.num_sequences + 8 * (self.num_documents + 1)


def read_header(path: Path) -> IndexHeader:
    """Raises DataError when this is not an index of version 1."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if len(head) < HEADER.size:
        raise DataError(
            f"{path}: {len(head)} bytes are too few for an index header; it was cut off: prepare it again"
        )
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(head)
    if magic != MAGIC or version != 1 or not 1 <= code <= 8 or num_boundaries < 1:
        raise DataError(
            f"{path}: not a Megatron index (magic {magic!r}, version {version}, dtype code {code}); "
            "give the prefix of a .bin/.idx pair"
        )
    return IndexHeader(
        dtype_code=code, num_sequences=num_sequences, num_documents=num_boundaries - 1
    )


def check_size(path: Path, *, expected: int, unit: str) -> None:
    """Raises DataError for a file of another size."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if found != expected:
        what = "cut off" if found < expected else "longer than its index says"
        raise DataError(
            f"{path}: has {found} bytes where its {unit} must have {expected}: {what}; prepare it again"
        )


def index_path(prefix: Path) -> Path:
    """`PREFIX.idx`, whatever dots the prefix has."""
    return prefix.with_name(prefix.name + ".idx")


def tokens_path(prefix: Path) -> Path:
    """`PREFIX.bin`, whatever dots the prefix has."""
    return prefix.with_name(prefix.name + ".bin")
