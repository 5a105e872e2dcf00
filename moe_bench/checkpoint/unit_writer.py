"""Writes one file of a torch_dist checkpoint from byte ranges of safetensors files. Runs in a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

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
from moe_bench.checkpoint.mapping import Piece
from moe_bench.checkpoint.open_files import OpenFiles
from moe_bench.checkpoint.part_file import PartFile
from moe_bench.checkpoint.plan import Chunk, Plan, Unit
from moe_bench.checkpoint.safetensors import StoredTensor
from moe_bench.checkpoint.source import scale_name
from moe_bench.checkpoint.torchsave import frame
from moe_bench.errors import CheckpointError

_LOOK_AHEAD_BYTES = 32 << 20


class SourceReader:
    """Reads ranges of the source's tensors into one buffer of a fixed size."""

    def __init__(self, buffer_bytes: int) -> None:
        self.buffer = memoryview(bytearray(buffer_bytes))
        self._files = OpenFiles()

    def read(self, name: str, stored: StoredTensor, offset: int, length: int) -> memoryview:
        """`length` bytes (at most the buffer's) from `offset` within the tensor; valid until the next read."""
        view = self.buffer[:length]
        if not self._files.read(stored.file, stored.offset + offset, view):
            raise CheckpointError(
                f"{stored.file}: ends inside tensor {name!r}; it has shrunk since it was opened"
            )
        return view

    def prefetch(self, stored: StoredTensor, offset: int, length: int) -> None:
        """Ask the kernel to fetch bytes of a tensor that will be read next."""
        self._files.prefetch(stored.file, stored.offset + offset, length)


class UnitWriter:
    """Writes units of a plan, one at a time."""

    def __init__(
        self, plan: Plan, folder: Path, *, buffer_bytes: int, allow_non_finite: bool
    ) -> None:
        self._plan, self._folder = plan, folder
        self._reader, self._scale_files = SourceReader(buffer_bytes), OpenFiles()
        self._wide = np.empty(buffer_bytes, np.uint16)
        self._scale: tuple[str, NDArray[np.float32]] | None = None
        self._allow_non_finite = allow_non_finite

    def write(self, unit: Unit) -> list[int]:
        """Write the unit's file under its final name, synced; return each chunk's CRC-32."""
        part = PartFile(self._folder / unit.file)
        ahead = _Ahead(self._plan, self._reader, unit)
        try:
            crcs = []
            for chunk, base in zip(unit.chunks, unit.offsets, strict=False):
                ahead.keep(chunk)
                crcs.append(self._chunk(part, chunk, base))
            part.finish(unit.num_bytes)
        finally:
            part.close()
        return crcs

    def _chunk(self, part: PartFile, chunk: Chunk, base: int) -> int:
        dtype = self._plan.tensors[chunk.tensor].dtype
        head, _ = frame(dtype, chunk.sizes, 0, base)
        at, crc = base + len(head), 0
        part.write(head, base)
        for read in chunk.reads:
            for block in self._blocks(read, dtype):
                if not self._allow_non_finite and has_non_finite(block, dtype):
                    self._refuse(read)
                crc = crc32(block, crc)
                part.write(block, at)
                at += len(block)
        head, tail = frame(dtype, chunk.sizes, crc, base)
        part.write(tail, at)
        part.write(head, base)
        return crc

    def _refuse(self, read: Piece) -> NoReturn:
        stored = self._plan.source.tensors[read.name]
        raise CheckpointError(
            f"{stored.file}: tensor {read.name!r} holds NaN or infinity; "
            "fetch the file again, or pass --allow-non-finite if it is meant"
        )

    def _blocks(self, read: Piece, dtype: str) -> Iterator[memoryview]:
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
        step = max(1, len(self._reader.buffer) // (2 * row_bytes))
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
        self, read: Piece, stored: StoredTensor, dtype: str, data: memoryview, first_row: int
    ) -> memoryview:
        if stored.dtype == "F8_E4M3":
            codes = np.frombuffer(data, np.uint8).reshape(-1, stored.shape[1])
            block = self._plan.scale_block
            assert block is not None, "the plan refuses FP8 without a block size"
            bits = self._wide[: codes.size].reshape(codes.shape)
            dequantize(codes, self._scales(read.name), first_row, block, out=bits)
            return memoryview(bits).cast("B")
        values = widen(data, stored.dtype) if stored.dtype != "F32" else narrow(data, dtype)
        if stored.dtype != "F32" and dtype != "F32":
            values = narrow(memoryview(values).cast("B"), dtype)
        return memoryview(values).cast("B")

    def _scales(self, name: str) -> NDArray[np.float32]:
        if self._scale is None or self._scale[0] != name:
            stored = self._plan.source.tensors[scale_name(name)]
            raw = memoryview(bytearray(stored.num_bytes))
            if not self._scale_files.read(stored.file, stored.offset, raw):
                raise CheckpointError(f"{stored.file}: ends inside the scale of {name!r}")
            self._scale = name, np.frombuffer(raw, np.float32).reshape(stored.shape)
        return self._scale[1]

    def _viewed(self, read: Piece, stored: StoredTensor, dtype: str) -> Iterator[memoryview]:
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

    def _packed(self, read: Piece, stored: StoredTensor) -> Iterator[memoryview]:
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


class _Ahead:
    """Keeps the kernel fetching what a unit will read next, a bounded number of bytes ahead."""

    def __init__(self, plan: Plan, reader: SourceReader, unit: Unit) -> None:
        self._tensors, self._reader = plan.source.tensors, reader
        self._coming = iter([read for chunk in unit.chunks for read in chunk.reads])
        self._fetched = 0

    def keep(self, chunk: Chunk) -> None:
        """Called before a chunk is read."""
        while self._fetched < _LOOK_AHEAD_BYTES:
            read = next(self._coming, None)
            if read is None:
                break
            self._fetched += self._fetch(read)
        self._fetched -= sum(self._extent(read)[1] for read in chunk.reads)

    def _fetch(self, read: Piece) -> int:
        offset, length = self._extent(read)
        self._reader.prefetch(self._tensors[read.name], offset, length)
        return length

    def _extent(self, read: Piece) -> tuple[int, int]:
        """Bytes of the tensor that the read needs, or of its expert when they lie scattered there."""
        stored = self._tensors[read.name]
        if read.expert is not None:
            length = stored.num_bytes // stored.shape[0]
            return read.expert * length, length
        row_bytes = stored.num_bytes // stored.shape[0]
        return read.first * row_bytes, read.rows * row_bytes
