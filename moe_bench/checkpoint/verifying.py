"""Are two checkpoints the same weights? Every tensor is compared, whichever formats the two have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_bench.checkpoint.arithmetic import Array
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.exporting import map_checkpoint
from moe_bench.checkpoint.importing import CARRIED
from moe_bench.checkpoint.metadata import TensorEntry
from moe_bench.checkpoint.plan import scale_block
from moe_bench.checkpoint.source import HfSource, open_hf, read_json
from moe_bench.checkpoint.torch_dist import (
    TRACKER,
    BoxReader,
    TorchDist,
    model_keys,
    open_torch_dist,
)
from moe_bench.checkpoint.weights import BLOCK_BYTES, HfWeights, MegatronWeights, Spec, Weights
from moe_bench.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor that is not the same."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a comparison found."""

    tensors: int
    num_bytes: int
    chunks_checked: int
    """Chunks of torch_dist checkpoints whose CRC-32 was recomputed."""
    differences: tuple[Difference, ...]


class RawWeights:
    """A torch_dist checkpoint under its own keys; leading axes are laid end to end as rows."""

    def __init__(self, checkpoint: TorchDist) -> None:
        self.place = str(checkpoint.folder)
        self._checkpoint, self._reader = checkpoint, BoxReader(checkpoint)

    @property
    def specs(self) -> dict[str, Spec]:
        """Weights only, optimizer state left out."""
        tensors = self._checkpoint.tensors
        return {
            key: Spec(tensors[key].dtype, tensors[key].shape)
            for key in model_keys(self._checkpoint)
        }

    def rows(self, name: str, first: int, count: int) -> Array:
        """Slices of the first axis."""
        return self._reader.rows(name, (), first, count)


def verify(a: Path, b: Path, on_progress: Callable[[str], None] = lambda _name: None) -> Verdict:
    """Compare all weights of `a` and `b`, each a Hugging Face model or a torch_dist checkpoint.

    FP8 is compared as the bfloat16 that it stands for. Raises CheckpointError when one of them cannot be read.
    """
    opened = [_open(path) for path in (a, b)]
    chunks, differences = 0, []
    for checkpoint in opened:
        if isinstance(checkpoint, TorchDist):
            for name, problem in damaged_chunks(checkpoint):
                chunks += 1
                if problem:
                    differences.append(Difference(name=name, reason=problem))
    ours, theirs = _comparable(opened[0], opened[1])
    num_bytes = 0
    names = [*ours.specs, *(name for name in theirs.specs if name not in ours.specs)]
    for name in names:
        on_progress(name)
        reason, size = _compare(name, ours, theirs)
        num_bytes += size
        if reason:
            differences.append(Difference(name=name, reason=reason))
    return Verdict(
        tensors=len(names),
        num_bytes=num_bytes,
        chunks_checked=chunks,
        differences=tuple(differences),
    )


def is_megatron(path: Path) -> bool:
    """Whether a folder is meant as a torch_dist checkpoint rather than a Hugging Face model."""
    return any((path / n).is_file() for n in (TRACKER, "metadata.json", ".metadata"))


def _open(path: Path) -> TorchDist | HfSource:
    return open_torch_dist(path) if is_megatron(path) else open_hf(path)


def _comparable(a: TorchDist | HfSource, b: TorchDist | HfSource) -> tuple[Weights, Weights]:
    """Both under the same names: Megatron's when both are Megatron's, else Hugging Face's."""
    if isinstance(a, TorchDist) and isinstance(b, TorchDist):
        return RawWeights(a), RawWeights(b)
    config = next(x.config for x in (a, b) if isinstance(x, HfSource))
    return _as_hf(a, config), _as_hf(b, config)


def _as_hf(opened: TorchDist | HfSource, config: Mapping[str, Any]) -> Weights:
    if isinstance(opened, HfSource):
        return HfWeights(opened, scale_block(opened))
    return _WithCopies(opened, config)


class _WithCopies:
    """A Megatron checkpoint that also answers for the redundant tensors that an import drops."""

    def __init__(self, checkpoint: TorchDist, config: Any) -> None:
        model_map = map_checkpoint(checkpoint, config)
        self._weights = MegatronWeights(checkpoint, model_map)
        self._copies = model_map.copies
        self.place = self._weights.place

    @property
    def specs(self) -> dict[str, Spec]:
        return dict(self._weights.specs)

    def rows(self, name: str, first: int, count: int) -> Array:
        return self._weights.rows(self._copies.get(name, name), first, count)

    def optional(self, name: str) -> Spec | None:
        """The type and shape of a dropped copy."""
        original = self._copies.get(name)
        return self._weights.specs[original] if original else None


def _spec(weights: Weights, name: str) -> Spec | None:
    found = weights.specs.get(name)
    return found or (weights.optional(name) if isinstance(weights, _WithCopies) else None)


def _compare(name: str, ours: Weights, theirs: Weights) -> tuple[str | None, int]:
    a, b = _spec(ours, name), _spec(theirs, name)
    if a is None or b is None:
        return f"is only in {ours.place if b is None else theirs.place}", 0
    if a.shape != b.shape:
        return (
            f"has the shape {list(a.shape)} in {ours.place} and {list(b.shape)} in {theirs.place}",
            0,
        )
    if a.dtype != b.dtype and {a.dtype, b.dtype} != {"F32", "BF16"}:
        return f"is {a.dtype} in {ours.place} and {b.dtype} in {theirs.place}", 0
    rows = a.shape[0] if a.shape else 1
    row_bytes = max(1, int(np.prod(a.shape[1:], dtype=np.int64)) * DTYPES[a.dtype].itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        x, y = ours.rows(name, row, count), theirs.rows(name, row, count)
        if not np.array_equal(_same_type(x, a.dtype, b.dtype), _same_type(y, b.dtype, a.dtype)):
            return f"differs within rows {row}..{row + count}", rows * row_bytes
    return None, rows * row_bytes


def _same_type(bits: Array, own: str, other: str) -> Array:
    """float32 beside bfloat16 is compared exactly, as float32."""
    if own == other or own == "F32":
        return bits
    return bits.astype(np.uint32) << 16


def damaged_chunks(checkpoint: TorchDist) -> Iterator[tuple[str, str | None]]:
    """(key, problem or None) for each chunk of the weights: is its zip whole, and is its CRC-32 what it states?

    Megatron's own writer may leave the CRC out (0); then only the structure is checked.
    """
    reader = BoxReader(checkpoint)
    seen: set[tuple[str, int]] = set()
    for key in model_keys(checkpoint):
        entry: TensorEntry = checkpoint.tensors[key]
        for box in entry.boxes:
            if (box.file, box.offset) in seen:
                continue
            seen.add((box.file, box.offset))
            try:
                found, stated = reader.crc(key, entry, box)
            except CheckpointError as error:
                yield key, str(error)
                continue
            wrong = (
                f"{checkpoint.folder / box.file}: damaged: CRC-32 {found:08x}, stated {stated:08x}"
            )
            yield key, None if found == stated or stated == 0 else wrong


def config_of(checkpoint: TorchDist) -> dict[str, Any] | None:
    """The Hugging Face configuration that an import carried along."""
    path = checkpoint.folder.parent / CARRIED / "config.json"
    return read_json(path) if path.is_file() else None
