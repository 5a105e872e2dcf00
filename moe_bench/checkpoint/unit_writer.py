"""Writes one file of a torch_dist checkpoint from byte ranges of safetensors files. Runs in a worker."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from moe_bench.checkpoint.arithmetic import (
    BITS,
    dequantize,
    dequantize_mxfp4,
    has_non_finite,
    narrow,
    plus,
    widen,
)
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.plan import Chunk, Plan, Read, Unit
from moe_bench.checkpoint.safetensors import StoredTensor
from moe_bench.checkpoint.source import scale_name
from moe_bench.checkpoint.torchsave import frame
from moe_bench.errors import CheckpointError

_OPEN_FILES = 4


class SourceReader:
    """Reads ranges of the source's files into one buffer of a fixed size."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer = memoryview(bytearray(buffer_bytes))
        self._fds: dict[Path, int] = {}

    def read(self, name: str, stored: StoredTensor, offset: int, length: int) -> memoryview:
        """`length` bytes (at most the buffer's) from `offset` within the tensor; valid until the next read."""
        view = self.buffer[:length]
        done = 0
        while done < length:
            got = os.preadv(self._fd(stored.file), [view[done:]], stored.offset + offset + done)
            if got == 0:
                raise CheckpointError(
                    f"{stored.file}: ends inside tensor {name!r}; it has shrunk since it was opened"
                )
            done += got
        return view

    def _fd(self, path: Path) -> int:
        if path not in self._fds:
            while len(self._fds) >= _OPEN_FILES:
                os.close(self._fds.pop(next(iter(self._fds))))
            self._fds[path] = os.open(path, os.O_RDONLY)
            os.posix_fadvise(self._fds[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._fds[path]

    def prefetch(self, stored: StoredTensor) -> None:
        """Ask the kernel to fetch a tensor that will be read next."""
        os.posix_fadvise(
            self._fd(stored.file), stored.offset, stored.num_bytes, os.POSIX_FADV_WILLNEED
        )


class UnitWriter:
    """Writes units of a plan, one at a time."""

    def __init__(
        self, plan: Plan, folder: Path, *, buffer_bytes: int, allow_non_finite: bool
    ) -> None:
        self._plan, self._folder = plan, folder
        self._reader = SourceReader(buffer_bytes)
        self._allow_non_finite = allow_non_finite

    def write(self, unit: Unit) -> list[int]:
        """Write the unit's file under its final name, synced; return each chunk's CRC-32."""
        part = self._folder / f"{unit.file}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            crcs = [
                self._chunk(fd, chunk, base, part)
                for chunk, base in zip(unit.chunks, unit.offsets, strict=False)
            ]
            if os.fstat(fd).st_size != unit.num_bytes:
                raise CheckpointError(
                    f"{part}: has {os.fstat(fd).st_size} bytes, planned {unit.num_bytes}"
                )
            os.fsync(fd)
        finally:
            os.close(fd)
        part.rename(self._folder / unit.file)
        return crcs

    def _chunk(self, fd: int, chunk: Chunk, base: int, path: Path) -> int:
        dtype = self._plan.tensors[chunk.tensor].dtype
        head, _ = frame(dtype, chunk.sizes, 0, base)
        at, crc = base + len(head), 0
        for read in chunk.reads:
            self._reader.prefetch(self._plan.source.tensors[read.name])
        for read in chunk.reads:
            for block in self._blocks(read, dtype):
                if not self._allow_non_finite and has_non_finite(block, dtype):
                    self._refuse(read)
                crc = zlib.crc32(block, crc)
                write_all(fd, block, at, path)
                at += len(block)
        head, tail = frame(dtype, chunk.sizes, crc, base)
        write_all(fd, head, base, path)
        write_all(fd, tail, at, path)
        return crc

    def _refuse(self, read: Read) -> NoReturn:
        stored = self._plan.source.tensors[read.name]
        raise CheckpointError(
            f"{stored.file}: tensor {read.name!r} holds NaN or infinity; "
            "fetch the file again, or pass --allow-non-finite if it is meant"
        )

    def _blocks(self, read: Read, dtype: str) -> Iterator[memoryview]:
        """The read's rows in the output's type, in blocks that fit the buffer."""
        stored = self._plan.source.tensors[read.name]
        if read.view is not None and read.view.packed:
            yield from self._packed(read, stored)
            return
        if read.view is not None:
            yield from self._viewed(read, stored, dtype)
            return
        matrix = stored.num_bytes // stored.shape[0] if read.expert is not None else 0
        rows_in_file = stored.shape[1] if read.expert is not None else stored.shape[0]
        row_bytes = (matrix or stored.num_bytes) // rows_in_file
        start = (read.expert or 0) * matrix + read.first * row_bytes
        if stored.dtype == dtype:
            yield from self._raw(read.name, stored, start, read.rows * row_bytes)
            return
        step = max(1, len(self._reader.buffer) // row_bytes)
        for row in range(0, read.rows, step):
            rows = min(step, read.rows - row)
            data = self._reader.read(read.name, stored, start + row * row_bytes, rows * row_bytes)
            yield self._converted(read, stored, dtype, data, read.first + row)

    def _raw(
        self, name: str, stored: StoredTensor, start: int, length: int
    ) -> Iterator[memoryview]:
        step = len(self._reader.buffer)
        for at in range(0, length, step):
            yield self._reader.read(name, stored, start + at, min(step, length - at))

    def _converted(
        self, read: Read, stored: StoredTensor, dtype: str, data: memoryview, first_row: int
    ) -> memoryview:
        if stored.dtype == "F8_E4M3":
            codes = np.frombuffer(data, np.uint8).reshape(-1, stored.shape[1])
            block = self._plan.scale_block
            assert block is not None, "the plan refuses FP8 without a block size"
            bits = dequantize(codes, self._scales(read.name), first_row, block)
            return memoryview(bits).cast("B")
        values = widen(data, stored.dtype) if stored.dtype != "F32" else narrow(data, dtype)
        if stored.dtype != "F32" and dtype != "F32":
            values = narrow(memoryview(values).cast("B"), dtype)
        return memoryview(values).cast("B")

    def _scales(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        stored = self._plan.source.tensors[name + "_scale_inv"]
        fd = os.open(stored.file, os.O_RDONLY)
        try:
            raw = os.pread(fd, stored.num_bytes, stored.offset)
        finally:
            os.close(fd)
        return np.frombuffer(raw, np.float32).reshape(stored.shape)

    def _viewed(self, read: Read, stored: StoredTensor, dtype: str) -> Iterator[memoryview]:
        """A transposed or strided matrix: read whole, because its rows lie scattered."""
        assert read.view is not None, "called for views only"
        if read.view.less_one:
            whole = self._reader.read(read.name, stored, 0, stored.num_bytes)
            bits = np.frombuffer(whole, BITS[DTYPES[stored.dtype].itemsize])
            yield memoryview(plus(bits, stored.dtype, -1.0)).cast("B")
            return
        if stored.dtype != dtype:
            raise CheckpointError(
                f"{stored.file}: tensor {read.name!r} is {stored.dtype} and must be {dtype}"
            )
        shape = stored.shape if read.expert is None else stored.shape[1:]
        length = stored.num_bytes if read.expert is None else stored.num_bytes // stored.shape[0]
        raw = bytearray(length)
        start = (read.expert or 0) * length
        for at in range(0, length, len(self._reader.buffer)):
            count = min(len(self._reader.buffer), length - at)
            raw[at : at + count] = self._reader.read(read.name, stored, start + at, count)
        bits = np.frombuffer(raw, BITS[DTYPES[dtype].itemsize]).reshape(shape)
        matrix = bits.T if read.view.transpose else bits
        rows = matrix[read.view.start :: read.view.step][read.first : read.first + read.rows]
        yield memoryview(np.ascontiguousarray(rows)).cast("B")

    def _packed(self, read: Read, stored: StoredTensor) -> Iterator[memoryview]:
        """Every `step`-th row of an expert's MXFP4 matrix, as bfloat16."""
        assert read.view is not None, "MXFP4 is a view"
        assert read.expert is not None, "MXFP4 tensors hold all experts"
        scale = self._plan.source.tensors[scale_name(read.name)]
        _, rows_in_file, blocks, half = stored.shape
        step, row_bytes = read.view.step, blocks * half
        base = read.expert * rows_in_file
        fit = max(1, len(self._reader.buffer) // (row_bytes * step * 8))
        for row in range(0, read.rows, fit):
            rows = min(fit, read.rows - row)
            at = base + (read.first + row) * step
            raw = self._reader.read(read.name, stored, at * row_bytes, rows * step * row_bytes)
            codes = (
                np.frombuffer(raw, np.uint8)
                .reshape(-1, blocks, half)[read.view.start :: step]
                .copy()
            )
            raw = self._reader.read(scale_name(read.name), scale, at * blocks, rows * step * blocks)
            scales = np.frombuffer(raw, np.uint8).reshape(-1, blocks)[read.view.start :: step]
            yield memoryview(dequantize_mxfp4(codes, scales)).cast("B")


def write_all(fd: int, data: memoryview | bytes, at: int, path: Path) -> None:
    """Write all of `data` at offset `at`. Raises CheckpointError naming the file."""
    view = memoryview(data)
    try:
        while len(view):
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{path}: the disk is full; free some space and run the same command again, it resumes"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
