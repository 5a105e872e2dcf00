"""Arithmetic on weights: FP8 and MXFP4 blocks to bfloat16 and back, widening, the search for values that are not numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BITS: dict[int, Any] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}
"""Unsigned type that holds an element of so many bytes."""

_FIRST_NON_FINITE = {
    "BF16": (np.int16, 0x7F80),
    "F16": (np.int16, 0x7C00),
    "F32": (np.int32, 0x7F800000),
}


def has_non_finite(raw: memoryview | bytes | bytearray, dtype: str) -> bool:
    """Whether any element is NaN or infinite: two integer maxima, no copy."""
    if dtype not in _FIRST_NON_FINITE or not len(raw):
        return False
    kind, limit = _FIRST_NON_FINITE[dtype]
    signed = np.frombuffer(raw, dtype=kind)
    sign = 1 << (8 * signed.itemsize - 1)
    unsigned = signed.view(BITS[signed.itemsize])
    return bool(int(signed.max()) >= limit or int(unsigned.max()) >= limit + sign)


def _e4m3_values() -> Array:
    """float32 value of each e4m3 code: the bits, moved to float16's place, are the value / 256."""
    codes = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int16)
    bits = ((codes & 0x7F) << 7) | (codes & np.int16(-32768))
    values = bits.view(np.float16).astype(np.float32) * np.float32(256)
    values[[0x7F, 0xFF]] = np.nan
    return values


E4M3 = _e4m3_values()


def to_bfloat16(values: Array) -> Array:
    """float32 to the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def dequantize(
    codes: Array, scales: Array, first_row: int, block: tuple[int, int], out: Array | None = None
) -> Array:
    """Bits of bfloat16 of e4m3 codes x the scale of their block, rounded once.

    codes: [rows, columns] uint8.  scales: [row blocks, column blocks] float32 of the whole matrix.
    Within a block there are only 256 results, so each block is one small table and one look-up, done in buffers that
    stay in a core's nearest cache. `out` takes the result where it is given.
    """
    if out is None:
        out = np.empty(codes.shape, np.uint16)
    for tile, table in _tiles(codes.shape, scales, first_row, block):
        at = codes[tile]
        out[tile] = table.take(at.astype(np.intp), mode="wrap")
    return out


def requantize(bits: Array, scales: Array, first_row: int, block: tuple[int, int]) -> Array | None:
    """The e4m3 codes that dequantise to exactly these bfloat16 bits; None when there are none."""
    out = np.empty(bits.shape, np.uint8)
    inverse = np.zeros(1 << 16, np.uint8)
    codes = np.arange(256, dtype=np.uint8)
    for tile, table in _tiles(bits.shape, scales, first_row, block):
        wanted = bits[tile]
        inverse[table] = codes
        found = inverse.take(wanted.astype(np.intp), mode="wrap")
        if not np.array_equal(table.take(found.astype(np.intp), mode="wrap"), wanted):
            return None
        out[tile] = found
    return out


def _tiles(
    shape: tuple[int, ...], scales: Array, first_row: int, block: tuple[int, int]
) -> Iterator[tuple[tuple[slice, slice], Array]]:
    """Each block's place within rows first_row .. of a matrix, and the bfloat16 bits of its 256 codes."""
    rows, columns = shape
    height, width = block
    row = 0
    while row < rows:
        band = (first_row + row) // height
        end = min(rows, (band + 1) * height - first_row)
        tables = to_bfloat16(scales[band][:, None] * E4M3)
        for j, table in enumerate(tables):
            yield (slice(row, end), slice(j * width, min(columns, (j + 1) * width))), table
        row = end


def _e2m1_values() -> Array:
    """float32 value of each 4-bit code: sign, two bits of exponent, one of mantissa."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([magnitudes, -magnitudes])


E2M1 = _e2m1_values()


def _mxfp4_pairs() -> Array:
    """For each scale and byte of codes, the bits of both bfloat16 values, low nibble first: [scale, byte] uint32.

    A value is e2m1(code) x 2**(scale - 127); bfloat16 holds each exactly. Scale 255 is the format's NaN.
    """
    with np.errstate(over="ignore"):
        values = np.ldexp(E2M1[None, :], np.arange(256, dtype=np.int32)[:, None] - 127)
    values[255] = np.nan
    bits = to_bfloat16(values).astype(np.uint32)
    byte = np.arange(256)
    return bits[:, byte & 15] | (bits[:, byte >> 4] << 16)


@cache
def _pairs() -> Array:
    return _mxfp4_pairs().reshape(-1)


def dequantize_mxfp4(codes: Array, scales: Array) -> Array:
    """Bits of bfloat16. codes: [rows, blocks, 16] uint8; scales: [rows, blocks] uint8 -> [rows, blocks * 32] uint16."""
    at = (scales.astype(np.int32)[..., None] << 8) | codes
    pairs = np.take(_pairs(), at)
    return pairs.view("<u2").reshape(len(codes), -1)


def requantize_mxfp4(bits: Array, scales: Array) -> Array | None:
    """The codes that dequantise to exactly these bfloat16 bits with these scales; None when there are none."""
    rows, blocks = scales.shape
    wide = widen(memoryview(np.ascontiguousarray(bits)).cast("B"), "BF16").reshape(rows, blocks, 32)
    halves = np.abs(np.ldexp(wide, 128 - scales.astype(np.int32)[..., None]))
    inverse = np.zeros(13, np.uint8)
    inverse[[0, 1, 2, 3, 4, 6, 8, 12]] = np.arange(8, dtype=np.uint8)
    nibbles = inverse[np.clip(np.nan_to_num(halves), 0, 12).astype(np.int64)]
    nibbles |= np.signbit(wide).astype(np.uint8) << 3
    codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return (
        codes if np.array_equal(dequantize_mxfp4(codes, scales), bits.reshape(rows, -1)) else None
    )


def plus(bits: Array, dtype: str, amount: float) -> Array:
    """float32 of the values (F32, F16 or BF16) plus `amount`."""
    raw = memoryview(np.ascontiguousarray(bits)).cast("B")
    values = np.frombuffer(raw, np.float32) if dtype == "F32" else widen(raw, dtype)
    return (values + np.float32(amount)).reshape(bits.shape)


def widen(raw: memoryview | bytes, dtype: str) -> Array:
    """F16 or BF16 to float32, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.float16).astype(np.float32)


def narrow(raw: memoryview | bytes, dtype: str) -> Array:
    """float32 to F16 or BF16, rounded to nearest even."""
    values = np.frombuffer(raw, np.float32)
    return to_bfloat16(values) if dtype == "BF16" else values.astype(np.float16)
