"""Two ways to read the same Hugging Face tensors: from safetensors, and re-derived from a torch_dist checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_bench.checkpoint.arithmetic import BITS, Array, dequantize
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.family import View
from moe_bench.checkpoint.mapping import ModelMap
from moe_bench.checkpoint.source import HfSource
from moe_bench.checkpoint.torch_dist import BoxReader, TorchDist
from moe_bench.checkpoint.unit_writer import SourceReader
from moe_bench.errors import CheckpointError

BLOCK_BYTES = 4 << 20
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
    """Tensors of a Hugging Face source. FP8 ones appear as the bfloat16 that they stand for."""

    def __init__(self, source: HfSource, block: tuple[int, int] | None) -> None:
        self.place = str(source.root)
        self._source, self._block = source, block
        self._scales: dict[str, NDArray[np.float32]] = {}

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Scales are not tensors of their own here."""
        return {
            name: Spec("BF16" if t.dtype == "F8_E4M3" else t.dtype, t.shape)
            for name, t in self._source.tensors.items()
            if not name.endswith("_scale_inv")
        }

    def rows(self, name: str, first: int, count: int) -> Array:
        """Raises CheckpointError when the file has shrunk."""
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
                    self._specs[piece.name] = Spec(entry.dtype, model_map.hf_shapes[piece.name])
                    row += piece.rows

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Types as the checkpoint stores them."""
        return self._specs

    def rows(self, name: str, first: int, count: int) -> Array:
        """Raises CheckpointError when a chunk is missing or damaged."""
        spec = self._specs[name]
        homes = self._homes[name]
        if homes[0].view is not None or homes[0].expert is not None:
            return self._fused(spec, homes, first, count)
        out = np.empty((count, *spec.shape[1:]), BITS[DTYPES[spec.dtype].itemsize])
        for home in homes:
            low, high = max(first, home.first), min(first + count, home.first + home.rows)
            if low < high:
                at = home.row + low - home.first
                out[low - first : high - first] = self._reader.rows(
                    home.key, home.lead, at, high - low
                )
        return out

    def _fused(self, spec: Spec, homes: list[_Home], first: int, count: int) -> Array:
        """Experts first .. first + count of a tensor that holds all experts."""
        out = np.empty((count, *spec.shape[1:]), BITS[DTYPES[spec.dtype].itemsize])
        for home in homes:
            assert home.expert is not None, "a view belongs to a tensor of all experts"
            if first <= home.expert < first + count:
                view = home.view or View()
                expert = out[home.expert - first]
                matrix = expert.T if view.transpose else expert
                rows = self._reader.rows(home.key, home.lead, home.row, home.rows)
                matrix[view.start :: view.step][home.first : home.first + home.rows] = rows
        return out


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
