"""Two ways to read the same Hugging Face tensors: from safetensors, and re-derived from a torch_dist checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_bench.checkpoint.arithmetic import (
    BITS,
    Array,
    dequantize,
    dequantize_mxfp4,
    narrow,
    plus,
)
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.family import View
from moe_bench.checkpoint.mapping import ModelMap
from moe_bench.checkpoint.source import HfSource, scale_name
from moe_bench.checkpoint.torch_dist import BoxReader, Extent, TorchDist
from moe_bench.checkpoint.unit_writer import SourceReader
from moe_bench.errors import CheckpointError

BLOCK_BYTES = 1 << 20
"""Rows are read in blocks of about this size."""


class Spec(NamedTuple):
    """Type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """Tensors by Hugging Face name."""

    place: str
    """What an error message calls it."""

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Type and shape of each tensor."""
        ...

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows of a tensor, as unsigned integers of the element's size."""
        ...


class HfWeights:
    """Tensors of a Hugging Face source. Quantised ones appear as the bfloat16 that they stand for.

    MXFP4 experts appear under the name and in the shape in which transformers writes them in bfloat16.
    """

    def __init__(self, source: HfSource, block: tuple[int, int] | None) -> None:
        self.place = str(source.root)
        self._source, self._block = source, block
        self._scales: dict[str, NDArray[np.float32]] = {}

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Scales are not tensors of their own here."""
        tensors = self._source.tensors
        scales = {scale_name(name) for name in tensors}
        found = {}
        for name, t in tensors.items():
            if name in scales or name.endswith("_scale_inv"):
                continue
            if self._is_packed(name):
                experts, rows, blocks, half = t.shape
                found[name.removesuffix("_blocks")] = Spec(
                    "BF16", (experts, blocks * half * 2, rows)
                )
            else:
                found[name] = Spec("BF16" if t.dtype == "F8_E4M3" else t.dtype, t.shape)
        return found

    def _is_packed(self, name: str) -> bool:
        return name.endswith("_blocks") and scale_name(name) in self._source.tensors

    def rows(self, name: str, first: int, count: int) -> Array:
        """Raises CheckpointError when the file has shrunk."""
        if name + "_blocks" in self._source.tensors:
            return self._unpacked(name + "_blocks", first, count)
        stored = self._source.tensors[name]
        shape = stored.shape or (1,)
        row_bytes = stored.num_bytes // shape[0]
        reader = SourceReader(count * row_bytes)
        raw = reader.read(name, stored, first * row_bytes, count * row_bytes)
        bits = np.frombuffer(raw, BITS[DTYPES[stored.dtype].itemsize]).reshape(count, *shape[1:])
        if stored.dtype != "F8_E4M3":
            return bits
        assert self._block is not None, "FP8 without a block size is refused when the plan is made"
        return dequantize(bits, self._scale(name), first, self._block)

    def _unpacked(self, name: str, first: int, count: int) -> Array:
        """Experts first .. first + count of an MXFP4 tensor."""
        stored = self._source.tensors[name]
        scale = self._source.tensors[scale_name(name)]
        _, rows, blocks, half = stored.shape
        size, codes_bytes = rows * blocks, rows * blocks * half
        reader = SourceReader(codes_bytes)
        out = np.empty((count, blocks * half * 2, rows), np.uint16)
        for i in range(count):
            raw = reader.read(name, stored, (first + i) * codes_bytes, codes_bytes)
            codes = np.frombuffer(raw, np.uint8).reshape(rows, blocks, half).copy()
            raw = reader.read(scale_name(name), scale, (first + i) * size, size)
            out[i] = dequantize_mxfp4(codes, np.frombuffer(raw, np.uint8).reshape(rows, blocks)).T
        return out

    def _scale(self, name: str) -> NDArray[np.float32]:
        if name not in self._scales:
            stored = self._source.tensors[name + "_scale_inv"]
            raw = SourceReader(stored.num_bytes).read(name, stored, 0, stored.num_bytes)
            self._scales = {name: np.frombuffer(raw, np.float32).reshape(stored.shape)}
        return self._scales[name]


class _Home(NamedTuple):
    """Where a Hugging Face tensor's rows are in the checkpoint."""

    key: str
    lead: tuple[int, ...]
    row: int
    """First row in the Megatron matrix."""
    first: int
    """First row in the Hugging Face matrix."""
    rows: int
    view: View | None
    expert: int | None


class MegatronWeights:
    """Tensors of a torch_dist checkpoint under their Hugging Face names. Optimizer state is not looked at."""

    def __init__(self, checkpoint: TorchDist, model_map: ModelMap) -> None:
        self.place = str(checkpoint.folder)
        self._reader = BoxReader(checkpoint)
        self._homes: dict[str, list[_Home]] = {}
        self._specs: dict[str, Spec] = {}
        for tensor in model_map.tensors:
            key = next((k for k in (tensor.key, *tensor.aliases) if k in checkpoint.tensors), None)
            if key is None:
                names = " nor ".join(map(repr, (tensor.key, *tensor.aliases)))
                raise CheckpointError(
                    f"{checkpoint.folder} has no {names}; the configuration is another model's"
                )
            entry = checkpoint.tensors[key]
            _check_shape(checkpoint, key, entry.shape, tensor.global_shape)
            for matrix in tensor.matrices:
                row = 0
                for piece in matrix.pieces:
                    home = _Home(
                        key, matrix.lead, row, piece.first, piece.rows, piece.view, piece.expert
                    )
                    self._homes.setdefault(piece.name, []).append(home)
                    shape = model_map.hf_shapes[piece.name]
                    if piece.view is not None and piece.view.packed:
                        shape = (*shape[:2], math.prod(shape[2:]) * 2)
                    self._specs[piece.name] = Spec(entry.dtype, shape)
                    row += piece.rows

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Types as the checkpoint stores them."""
        return self._specs

    def rows(self, name: str, first: int, count: int) -> Array:
        """Raises CheckpointError when a chunk is missing or damaged."""
        spec = self._specs[name]
        homes = self._homes[name]
        if homes[0].expert is not None:
            return self._fused(spec, homes, first, count)
        if len(homes) == 1 and homes[0].view is None:
            home = homes[0]
            return self._reader.rows(home.key, home.lead, home.row + first - home.first, count)
        out = np.empty((count, *spec.shape[1:]), BITS[DTYPES[spec.dtype].itemsize])
        for home in homes:
            low, high = max(first, home.first), min(first + count, home.first + home.rows)
            if low < high:
                at = home.row + low - home.first
                rows = self._reader.rows(home.key, home.lead, at, high - low)
                if home.view is not None and home.view.less_one:
                    rows = _plus_one(rows, spec.dtype)
                out[low - first : high - first] = rows
        return out

    def extents(self, name: str) -> list[Extent] | None:
        """Where the tensor's bytes lie, in order; None when they are not there as they are.

        Raises CheckpointError when a chunk is missing or damaged.
        """
        homes = sorted(self._homes[name], key=lambda home: home.first)
        if any(home.expert is not None or home.view is not None for home in homes):
            return None
        found: list[Extent] = []
        for home in homes:
            part = self._reader.extents(home.key, home.lead, home.row, home.rows)
            if part is None:
                return None
            found += part
        return found

    def _fused(self, spec: Spec, homes: list[_Home], first: int, count: int) -> Array:
        """Experts first .. first + count of a tensor that holds all experts."""
        out = np.empty((count, *spec.shape[1:]), BITS[DTYPES[spec.dtype].itemsize])
        for home in homes:
            assert home.expert is not None, "called for tensors of all experts"
            if first <= home.expert < first + count:
                view = home.view or View()
                expert = out[home.expert - first]
                matrix = expert.T if view.transpose else expert
                rows = self._reader.rows(home.key, home.lead, home.row, home.rows)
                matrix[view.start :: view.step][home.first : home.first + home.rows] = rows
        return out


def _plus_one(bits: Array, dtype: str) -> Array:
    values = plus(bits, dtype, 1.0)
    if dtype == "F32":
        return values.view(np.uint32)
    narrowed = narrow(memoryview(values).cast("B"), dtype)
    return narrowed.view(np.uint16).reshape(bits.shape)


_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def _check_shape(
    checkpoint: TorchDist, key: str, stored: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Equal, except that Megatron pads the vocabulary's rows."""
    padded = key in _VOCABULARY and stored[1:] == wanted[1:] and stored[0] >= wanted[0]
    if stored != wanted and not padded:
        raise CheckpointError(
            f"{checkpoint.folder}: {key!r} has the shape {list(stored)}, but the configuration gives it {list(wanted)}"
        )
