"""Megatron's indexed dataset on disk: `PREFIX.bin` holds tokens, `PREFIX.idx` where each sequence is.

Layout: index_header.py. Written here by numpy: importing Megatron for its builder costs ten seconds and needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from moe_bench.data.index_header import (
    HEADER,
    MAGIC,
    IndexHeader,
    check_size,
    index_path,
    read_header,
    tokens_path,
)
from moe_bench.errors import DataError

DTYPE_OF_CODE: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
CODE_OF_DTYPE: dict[np.dtype[np.generic], int] = {
    dtype: code for code, dtype in DTYPE_OF_CODE.items()
}
UINT16_VOCAB_LIMIT = 65500
"""Megatron's DType.optimal_dtype: smaller vocabularies are stored as uint16, others as int32."""
CHUNK_ITEMS = 1 << 20
"""Items converted at a time, so that an index of any size is written in a few MiB of memory."""

type TokenDType = np.dtype[np.uint16] | np.dtype[np.int32]


def token_dtype(vocab_size: int) -> TokenDType:
    """The dtype Megatron chooses for this vocabulary."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCAB_LIMIT else np.dtype(np.int32)


def write_index(
    target: BinaryIO, *, dtype: TokenDType, lengths_file: Path, document_sizes_file: Path
) -> None:
    """Write the index of sequences whose i32 lengths, and documents whose i32 sequence counts, are in these files."""
    num_sequences = lengths_file.stat().st_size // 4
    num_boundaries = document_sizes_file.stat().st_size // 4 + 1
    target.write(HEADER.pack(MAGIC, 1, CODE_OF_DTYPE[dtype], num_sequences, num_boundaries))
    for lengths in _chunks(lengths_file):
        target.write(lengths.tobytes())
    offset = 0
    for lengths in _chunks(lengths_file):
        ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize + offset
        starts = np.concatenate(([offset], ends[:-1]))
        target.write(starts.astype(np.int64).tobytes())
        offset = int(ends[-1])
    boundary = 0
    target.write(np.int64(0).tobytes())
    for sizes in _chunks(document_sizes_file):
        boundaries = np.cumsum(sizes, dtype=np.int64) + boundary
        target.write(boundaries.tobytes())
        boundary = int(boundaries[-1])


def _chunks(path: Path) -> Iterator[NDArray[np.int32]]:
    with path.open("rb") as stream:
        while block := stream.read(CHUNK_ITEMS * 4):
            yield np.frombuffer(block, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedDataset:
    """An index in memory maps, with its tokens."""

    header: IndexHeader
    dtype: np.dtype[np.generic]
    """Of the tokens."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence."""
    offsets: NDArray[np.int64]
    """Byte at which each sequence starts in the .bin file."""
    boundaries: NDArray[np.int64]
    """Sequence at which each document starts, then the number of sequences."""
    tokens: NDArray[np.generic]
    """All tokens, in order."""


def open_dataset(prefix: Path) -> IndexedDataset:
    """Map both files after checking that their sizes fit each other. Raises DataError."""
    idx_path, bin_path = index_path(prefix), tokens_path(prefix)
    header = read_header(idx_path)
    check_size(idx_path, expected=header.index_bytes, unit="index")
    dtype = DTYPE_OF_CODE[header.dtype_code]
    raw = np.memmap(idx_path, mode="r", dtype=np.uint8)
    at = HEADER.size
    lengths, at = _view(raw, np.dtype(np.int32), header.num_sequences, at)
    offsets, at = _view(raw, np.dtype(np.int64), header.num_sequences, at)
    boundaries, _ = _view(raw, np.dtype(np.int64), header.num_documents + 1, at)
    num_tokens = int(lengths.sum(dtype=np.int64))
    check_size(bin_path, expected=num_tokens * dtype.itemsize, unit="tokens")
    _check_pointers(idx_path, lengths, offsets, boundaries, itemsize=dtype.itemsize)
    empty: NDArray[np.generic] = np.empty(0, dtype=dtype)
    tokens = np.memmap(bin_path, mode="r", dtype=dtype) if num_tokens else empty
    return IndexedDataset(
        header=header,
        dtype=dtype,
        lengths=lengths,
        offsets=offsets,
        boundaries=boundaries,
        tokens=tokens,
    )


def _view[T: np.generic](
    raw: NDArray[np.uint8], dtype: np.dtype[T], count: int, at: int
) -> tuple[NDArray[T], int]:
    end = at + count * dtype.itemsize
    return np.frombuffer(raw.data, dtype=dtype, count=count, offset=at), end


def _check_pointers(
    path: Path,
    lengths: NDArray[np.int32],
    offsets: NDArray[np.int64],
    boundaries: NDArray[np.int64],
    *,
    itemsize: int,
) -> None:
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    starts = np.concatenate(([0], ends))[:-1]
    ordered = bool(np.all(np.diff(boundaries) >= 0))
    if not np.array_equal(starts, offsets) or boundaries[-1] != len(lengths) or not ordered:
        raise DataError(
            f"{path}: its offsets do not follow from its lengths: damaged; prepare it again"
        )
