"""Writes one safetensors file from a torch_dist checkpoint. Runs in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from moe_bench.checkpoint.arithmetic import Array, narrow, requantize, requantize_mxfp4, widen
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.exporting import ExportPlan, OutTensor, Portion, header_of
from moe_bench.checkpoint.open_files import OpenFiles
from moe_bench.checkpoint.part_file import PartFile
from moe_bench.checkpoint.source import scale_name
from moe_bench.checkpoint.torch_dist import Extent
from moe_bench.checkpoint.weights import BLOCK_BYTES, MegatronWeights
from moe_bench.errors import CheckpointError


class FileWriter:
    """Writes portions of the plan's files into their `.part` files; the parent gives those their names."""

    def __init__(self, plan: ExportPlan, out: Path) -> None:
        self._plan, self._out = plan, out
        self._weights = MegatronWeights(plan.checkpoint, plan.model_map)
        self._files = OpenFiles()
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def write(self, portion: Portion) -> None:
        """Write some of a file's tensors, and its header with the first of them."""
        header, offsets = header_of(self._plan, portion.file)
        part = PartFile(self._out / portion.file, anew=False)
        try:
            if portion.first == 0:
                part.write(header, 0)
            for tensor in portion.of(self._plan):
                self._tensor(part, tensor, offsets[tensor.name])
            part.start_write_back()
        finally:
            part.close()

    def _tensor(self, part: PartFile, tensor: OutTensor, at: int) -> None:
        if tensor.origin in self._plan.scales:
            part.write(self._scale(tensor.origin), at)
            return
        spec = self._weights.specs[tensor.origin]
        extents = self._weights.extents(tensor.origin) if tensor.dtype == spec.dtype else None
        if extents is not None:
            self._copy(part, extents, at)
            return
        row_bytes = max(
            1, int(np.prod(spec.shape[1:], dtype=np.int64)) * DTYPES[spec.dtype].itemsize
        )
        step = max(1, BLOCK_BYTES // row_bytes)
        for row in range(0, spec.shape[0], step):
            bits = self._weights.rows(tensor.origin, row, min(step, spec.shape[0] - row))
            raw = memoryview(np.ascontiguousarray(self._cast(tensor, spec.dtype, bits, row))).cast(
                "B"
            )
            part.write(raw, at)
            at += len(raw)

    def _copy(self, part: PartFile, extents: Sequence[Extent], at: int) -> None:
        """Bytes as they are, through one buffer."""
        for extent in extents:
            self._files.prefetch(extent.file, extent.offset, extent.num_bytes)
        for extent in extents:
            for done in range(0, extent.num_bytes, len(self._buffer)):
                view = self._buffer[: min(len(self._buffer), extent.num_bytes - done)]
                if not self._files.read(extent.file, extent.offset + done, view):
                    raise CheckpointError(f"{extent.file}: ends inside a chunk")
                part.write(view, at)
                at += len(view)

    def _cast(self, tensor: OutTensor, dtype: str, bits: Array, row: int) -> Array:
        if tensor.dtype == dtype:
            return bits
        if tensor.dtype == "F8_E4M3":
            return self._quantized(tensor, bits, row)
        if tensor.dtype == "U8":
            return self._packed(tensor, bits, row)
        raw = memoryview(np.ascontiguousarray(bits)).cast("B")
        wide = memoryview(widen(raw, dtype)).cast("B") if dtype != "F32" else raw
        if tensor.dtype == "F32":
            return np.frombuffer(wide, np.uint32)
        return narrow(wide, tensor.dtype)

    def _quantized(self, tensor: OutTensor, bits: Array, row: int) -> Array:
        block = self._plan.scale_block
        assert block is not None, "scales come with a manifest that states their block"
        stored = self._plan.scales[tensor.origin + "_scale_inv"]
        scales = np.frombuffer(self._scale(tensor.origin + "_scale_inv"), np.float32)
        codes = requantize(bits, scales.reshape(stored.shape), row, block)
        if codes is None:
            self._refuse(tensor)
        return codes

    def _packed(self, tensor: OutTensor, bits: Array, first: int) -> Array:
        """MXFP4 codes of experts first .. first + len(bits)."""
        name = scale_name(tensor.origin)
        scales = np.frombuffer(self._scale(name), np.uint8).reshape(self._plan.scales[name].shape)
        codes = []
        for expert, matrix in enumerate(bits, first):
            found = requantize_mxfp4(matrix, scales[expert])
            if found is None:
                self._refuse(tensor)
            codes.append(found)
        return np.stack(codes)

    def _refuse(self, tensor: OutTensor) -> NoReturn:
        raise CheckpointError(
            f"{self._plan.checkpoint.folder}: {tensor.name!r} no longer has the values of its quantised source "
            "(it was trained); export without --fp8"
        )

    def _scale(self, name: str) -> bytes:
        stored = self._plan.scales[name]
        with stored.file.open("rb") as file:
            file.seek(stored.offset)
            return file.read(stored.num_bytes)
