"""Element types by their safetensors name, and what torch calls them."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type."""

    itemsize: int
    """Bytes of one element."""
    torch_name: str
    """Attribute of the torch module."""
    storage: str
    """Class that torch.save names for it; empty where our writer never stores it."""


DTYPES = {
    "F64": DType(8, "float64", "DoubleStorage"),
    "F32": DType(4, "float32", "FloatStorage"),
    "F16": DType(2, "float16", "HalfStorage"),
    "BF16": DType(2, "bfloat16", "BFloat16Storage"),
    "I64": DType(8, "int64", "LongStorage"),
    "I32": DType(4, "int32", "IntStorage"),
    "I16": DType(2, "int16", "ShortStorage"),
    "I8": DType(1, "int8", "CharStorage"),
    "U8": DType(1, "uint8", "ByteStorage"),
    "BOOL": DType(1, "bool", "BoolStorage"),
    "F8_E4M3": DType(1, "float8_e4m3fn", ""),
    "F8_E5M2": DType(1, "float8_e5m2", ""),
    "F8_E8M0": DType(1, "float8_e8m0fnu", ""),
}

WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""Types in which a converted weight may be stored."""

BY_TORCH_NAME = {dtype.torch_name: name for name, dtype in DTYPES.items()}
BY_STORAGE = {dtype.storage: name for name, dtype in DTYPES.items() if dtype.storage}
