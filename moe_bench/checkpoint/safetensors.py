"""The header of a safetensors file, read and distrusted: names, types, shapes and byte ranges; no weight is touched."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.errors import CheckpointError

MAX_HEADER = 100_000_000
"""The format's own limit, in bytes."""
_MOST_AXES = 8


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the file's start."""
    num_bytes: int


def read_header(path: Path) -> tuple[dict[str, StoredTensor], bytes]:
    """Tensors by name, and the header's raw bytes.

    Raises CheckpointError when the file is cut off, has bytes that no tensor owns, names a tensor twice or states a
    size that its shape does not have.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut off inside its header "
                    f"({size} bytes, header says {length}); fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse(path, raw, size), raw


def _parse(path: Path, raw: bytes, size: int) -> dict[str, StoredTensor]:
    try:
        pairs = json.loads(raw, object_pairs_hook=_refuse_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is damaged: {error}") from error
    if not isinstance(pairs, dict):
        raise CheckpointError(f"{path}: the header is not a table of tensors")
    start = 8 + len(raw)
    tensors = {
        name: _tensor(path, name, entry, start)
        for name, entry in pairs.items()
        if name != "__metadata__"
    }
    _check_tiling(path, tensors, start, size)
    return tensors


def _refuse_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return table


def _tensor(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    if not (isinstance(entry, dict) and name.isprintable()):
        raise CheckpointError(_malformed(path, name, entry))
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (
        _naturals(shape) and _naturals(offsets) and len(offsets) == 2 and len(shape) <= _MOST_AXES
    ):
        raise CheckpointError(_malformed(path, name, entry))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}")
    first, last = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {dtype} {list(shape)} takes {expected} bytes, "
            f"but the header gives it {last - first}"
        )
    return StoredTensor(path, dtype, tuple(shape), start + first, expected)


def _malformed(path: Path, name: str, entry: object) -> str:
    return f"{path}: tensor {name!r}: the header's entry is malformed: {repr(entry)[:200]}"


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all([type(v) is int and 0 <= v < 2**63 for v in values])  # noqa: C419 - hot


def _check_tiling(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Tensors must cover the data exactly: overlaps alias weights, gaps hide bytes, a short file lost some."""
    at = start
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if tensor.offset != at:
            kind = "overlaps another" if tensor.offset < at else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}; the file is damaged")
        at += tensor.num_bytes
        if at > size:
            raise CheckpointError(
                f"{path}: cut off inside tensor {name!r}: the file has {size} bytes, the tensor ends at {at}"
            )
    if at != size:
        raise CheckpointError(
            f"{path}: {size - at} bytes after the last tensor; the file is damaged"
        )


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file holding (name, dtype, shape) in this order, and each tensor's offset in the file."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, int] = {}
    at = 0
    for name, dtype, shape in tensors:
        num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        ends[name] = at
        at += num_bytes
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    return struct.pack("<Q", len(raw)) + raw, {name: base + offset for name, offset in ends.items()}
