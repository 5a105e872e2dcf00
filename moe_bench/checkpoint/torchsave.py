"""One contiguous tensor as a `torch.save` stream, framed and parsed without torch.

The stream is a stored zip: `data.pkl`, `byteorder`, `version`, then the payload `data/0` on a 64-byte boundary. Its
length depends only on the dtype, the shape and the file offset, so a plan knows where each chunk will lie. torch does
not check the zip's CRC-32 of the payload; `verify` does.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zlib
from functools import cache
from typing import NamedTuple

from moe_bench.checkpoint.dtypes import BY_STORAGE, DTYPES
from moe_bench.checkpoint.metadata import DAMAGED_PICKLE
from moe_bench.errors import CheckpointError

ALIGNMENT = 64
_LOCAL, _CENTRAL, _END = 0x04034B50, 0x02014B50, 0x06054B50
_PAYLOAD_NAME = b"archive/data/0"
_PADDING_TAG = 0x4246
"""torch's own tag for the extra field that pads a record."""
ZIP32_LIMIT = 2**32 - 1


def frame(dtype: str, shape: tuple[int, ...], crc: int, base: int) -> tuple[bytes, bytes]:
    """The bytes before and after the payload of a stream that starts at file offset `base`."""
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if num_bytes >= ZIP32_LIMIT:
        raise CheckpointError(f"a chunk of {num_bytes} bytes does not fit a zip record; cut it")
    records, directory = _constant_records(dtype, shape)
    pad = -(base + len(records) + 30 + len(_PAYLOAD_NAME) + 4) % ALIGNMENT
    extra = struct.pack("<HH", _PADDING_TAG, pad) + b"Z" * pad
    head = records + _local(_PAYLOAD_NAME, crc, num_bytes, extra)
    central = directory + _central(_PAYLOAD_NAME, crc, num_bytes, len(records))
    end = struct.pack("<IHHHHIIH", _END, 0, 0, 4, 4, len(central), len(head) + num_bytes, 0)
    return head, central + end


def framed_length(dtype: str, shape: tuple[int, ...], base: int) -> int:
    """Bytes of the whole stream that starts at file offset `base`."""
    head, tail = frame(dtype, shape, 0, base)
    return len(head) + math.prod(shape) * DTYPES[dtype].itemsize + len(tail)


@cache
def _constant_records(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    records = directory = b""
    for name, data in (
        (b"archive/data.pkl", _tensor_pickle(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        crc = zlib.crc32(data)
        directory += _central(name, crc, len(data), len(records))
        records += _local(name, crc, len(data), b"") + data
    return records, directory


def object_stream(pickled: bytes) -> bytes:
    """A `torch.save` stream of an object that holds no tensor, from its pickle."""
    records = directory = b""
    entries = (
        (b"archive/data.pkl", pickled),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    )
    for name, data in entries:
        crc = zlib.crc32(data)
        directory += _central(name, crc, len(data), len(records))
        records += _local(name, crc, len(data), b"") + data
    end = struct.pack("<IHHHHIIH", _END, 0, 0, 3, 3, len(directory), len(records), 0)
    return records + directory + end


def _local(name: bytes, crc: int, size: int, extra: bytes) -> bytes:
    fields = (_LOCAL, 0, 0, 0, 0, 0, crc, size, size, len(name), len(extra))
    return struct.pack("<IHHHHHIIIHH", *fields) + name + extra


def _central(name: bytes, crc: int, size: int, offset: int) -> bytes:
    fields = (_CENTRAL, 0, 0, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, offset)
    return struct.pack("<IHHHHHHIIIHHHHHII", *fields) + name


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What torch.save writes for a contiguous CPU tensor: `_rebuild_tensor_v2(storage, 0, shape, strides, ...)`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    storage = b"(" + _text("storage") + b"ctorch\n" + DTYPES[dtype].storage.encode() + b"\n"
    storage += _text("0") + _text("cpu") + _integer(math.prod(shape)) + b"tQ"
    body = storage + _integer(0) + _integers(shape) + _integers(tuple(reversed(strides)))
    body += b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR."


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    if value < 256:
        return b"K" + bytes([value])
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


class Stored(NamedTuple):
    """Where a stream keeps its tensor."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the stream's start to the first element."""
    crc: int
    """CRC-32 that the zip states for the storage."""
    storage: int
    """Bytes from the stream's start to the storage, which may begin before the tensor."""
    num_bytes: int
    """Bytes of the whole storage."""


class _Storage(NamedTuple):
    dtype: str
    name: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StorageClass(NamedTuple):
    dtype: str


def _rebuild(
    storage: object, offset: object, shape: object, strides: object, *_: object
) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise CheckpointError("not a stored tensor")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise CheckpointError("not a stored tensor's shape")
    return _Tensor(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Knows a tensor's few constructors and calls nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module in ("torch", "torch.storage") and name in BY_STORAGE:
            return _StorageClass(BY_STORAGE[name])
        raise CheckpointError(f"a chunk names {module}.{name}, which no stored tensor needs")

    def persistent_load(self, pid: object) -> object:
        if not (isinstance(pid, tuple) and len(pid) >= 3 and isinstance(pid[1], _StorageClass)):
            raise CheckpointError("a chunk names its storage in an unknown way")
        return _Storage(pid[1].dtype, str(pid[2]))


def parse(stream: ZipWindow) -> Stored:
    """Find the tensor inside a stream. Raises CheckpointError for anything but one contiguous tensor."""
    entries = stream.entries()
    prefix = next((name[: -len("data.pkl")] for name in entries if name.endswith("data.pkl")), None)
    if prefix is None:
        raise CheckpointError("a chunk has no data.pkl")
    if stream.small(entries.get(prefix + "byteorder"), b"little") != b"little":
        raise CheckpointError("a chunk is big-endian")
    try:
        pickled = stream.small(entries[prefix + "data.pkl"], b"")
        tensor = _TensorUnpickler(io.BytesIO(pickled)).load()
    except DAMAGED_PICKLE as error:
        raise CheckpointError(f"a chunk's data.pkl cannot be read: {error!r}") from error
    if not isinstance(tensor, _Tensor):
        raise CheckpointError(f"a chunk holds a {type(tensor).__name__}, not one tensor")
    entry = entries.get(f"{prefix}data/{tensor.storage.name}")
    if entry is None:
        raise CheckpointError("a chunk's storage is missing")
    itemsize = DTYPES[tensor.storage.dtype].itemsize
    first = tensor.offset * itemsize
    if not _is_contiguous(tensor) or first + math.prod(tensor.shape) * itemsize > entry.size:
        raise CheckpointError("a chunk's tensor is not contiguous or outgrows its storage")
    storage = stream.payload(entry)
    return Stored(
        tensor.storage.dtype, tensor.shape, storage + first, entry.crc, storage, entry.size
    )


def _is_contiguous(tensor: _Tensor) -> bool:
    step = 1
    if len(tensor.shape) != len(tensor.strides):
        return False
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


class ZipEntry(NamedTuple):
    """One stored record."""

    header: int
    size: int
    crc: int


class ZipWindow:
    """A stored zip inside an open file; offsets are relative to its start."""

    def __init__(self, fd: int, start: int, length: int) -> None:
        self._fd, self._start, self.length = fd, start, length

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises CheckpointError when the file ends first."""
        if offset < 0 or length < 0 or offset + length > self.length:
            raise CheckpointError("a chunk's zip points outside itself")
        data = os.pread(self._fd, length, self._start + offset)
        if len(data) != length:
            raise CheckpointError("the file ends inside a chunk")
        return data

    def entries(self) -> dict[str, ZipEntry]:
        """Records by name, from the central directory; zip64 sizes included."""
        tail_start = max(0, self.length - 4096)
        tail = self.read(tail_start, self.length - tail_start)
        at = tail.rfind(struct.pack("<I", _END))
        if at < 0 or at + 22 > len(tail):
            raise CheckpointError("a chunk is not a zip, or its end is cut off")
        count, size, offset = struct.unpack_from("<HII", tail, at + 10)
        if offset == 0xFFFFFFFF or count == 0xFFFF:
            count, size, offset = self._zip64(tail, at)
        if size > 1 << 24:
            raise CheckpointError("a chunk's zip directory is absurdly large")
        return dict(_directory(self.read(offset, size), count))

    def _zip64(self, tail: bytes, at: int) -> tuple[int, int, int]:
        locator = at - 20
        if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
            raise CheckpointError("a chunk's zip64 locator is missing")
        (end,) = struct.unpack_from("<Q", tail, locator + 8)
        count, size, offset = struct.unpack_from("<QQQ", self.read(end, 56), 32)
        return count, size, offset

    def small(self, entry: ZipEntry | None, absent: bytes) -> bytes:
        """A short record's bytes, or `absent`."""
        if entry is None:
            return absent
        if entry.size > 1 << 20:
            raise CheckpointError("a chunk's description is absurdly large")
        return self.read(self.payload(entry), entry.size)

    def payload(self, entry: ZipEntry) -> int:
        """Offset of the record's first byte."""
        header = self.read(entry.header, 30)
        if header[:4] != struct.pack("<I", _LOCAL):
            raise CheckpointError("a chunk's zip record has no header")
        name, extra = struct.unpack_from("<HH", header, 26)
        start = entry.header + 30 + name + extra
        if start + entry.size > self.length:
            raise CheckpointError("a chunk's record is cut off")
        return start


def _directory(raw: bytes, count: int) -> list[tuple[str, ZipEntry]]:
    found, at = [], 0
    for _ in range(count):
        if raw[at : at + 4] != struct.pack("<I", _CENTRAL) or at + 46 > len(raw):
            raise CheckpointError("a chunk's zip directory is damaged")
        method, crc = (
            struct.unpack_from("<H", raw, at + 10)[0],
            struct.unpack_from("<I", raw, at + 16)[0],
        )
        packed, size, name_len, extra_len, comment_len = struct.unpack_from("<IIHHH", raw, at + 20)
        (header,) = struct.unpack_from("<I", raw, at + 42)
        name = raw[at + 46 : at + 46 + name_len].decode("utf-8", "replace")
        extra = raw[at + 46 + name_len : at + 46 + name_len + extra_len]
        if method != 0:
            raise CheckpointError("a chunk's zip is compressed")
        size, packed, header = _zip64_fields(extra, size, packed, header)
        found.append((name, ZipEntry(header, size, crc)))
        at += 46 + name_len + extra_len + comment_len
    return found


def _zip64_fields(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    values, at = [], 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
        at += 4 + length
    out = []
    for value in (size, packed, header):
        out.append(values.pop(0) if value == 0xFFFFFFFF and values else value)
    return out[0], out[1], out[2]
