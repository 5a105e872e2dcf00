"""Are two checkpoints the same weights? Every tensor is compared, whichever formats the two have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_bench.checkpoint.arithmetic import Array, widen
from moe_bench.checkpoint.dtypes import DTYPES, WEIGHT_DTYPES
from moe_bench.checkpoint.exporting import map_checkpoint
from moe_bench.checkpoint.metadata import Box
from moe_bench.checkpoint.plan import scale_block
from moe_bench.checkpoint.source import CARRIED, HfSource, open_hf, read_json
from moe_bench.checkpoint.torch_dist import (
    BoxReader,
    TorchDist,
    is_torch_dist,
    model_keys,
    open_torch_dist,
)
from moe_bench.checkpoint.weights import BLOCK_BYTES, HfWeights, MegatronWeights, Spec, Weights
from moe_bench.checkpoint.workers import Work, run_tasks
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
    """A torch_dist checkpoint under its own keys, cut into matrices: `key[layer, expert]`."""

    def __init__(self, checkpoint: TorchDist) -> None:
        self.place = str(checkpoint.folder)
        self._reader = BoxReader(checkpoint)
        self._at: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._specs: dict[str, Spec] = {}
        for key in model_keys(checkpoint):
            dtype, shape, _ = checkpoint.tensors[key]
            axes = len(shape) - 2 if shape[-2:-1] > (1,) else 0  # a convolution's 1 is no matrix
            for lead in np.ndindex(*shape[:axes]):
                name = key + (str(list(lead)) if axes else "")
                self._at[name] = (key, tuple(map(int, lead)))
                self._specs[name] = Spec(dtype, shape[axes:])

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Weights only, optimizer state left out."""
        return self._specs

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows of a matrix."""
        return self._reader.rows(*self._at[name], first, count)


class _Chunk(NamedTuple):
    """Task: is this chunk's CRC-32 what its zip states?"""

    checkpoint: TorchDist
    key: str
    box: Box


def verify(
    a: Path,
    b: Path,
    *,
    processes: int = 2,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Verdict:
    """Compare all weights of `a` and `b`, each a Hugging Face model or a torch_dist checkpoint.

    FP8 is compared as the bfloat16 that it stands for. Raises CheckpointError when one of them cannot be read.
    """
    opened = [_open(path) for path in (a, b)]
    chunks = [task for found in opened if isinstance(found, TorchDist) for task in _chunks(found)]
    ours, theirs = _comparable(opened[0], opened[1])
    names = [*ours.specs, *(name for name in theirs.specs if name not in ours.specs)]
    tasks: list[_Chunk | str] = [*chunks, *names]
    sizes = [_size(task, ours, theirs) for task in tasks]

    def start() -> Work:
        readers = {id(found): BoxReader(found) for found in opened if isinstance(found, TorchDist)}

        def work(task: _Chunk | str) -> Difference | None:
            if isinstance(task, str):
                reason = _compare(task, ours, theirs)
                return Difference(name=task, reason=reason) if reason else None
            problem = _problem(readers[id(task.checkpoint)], task)
            return Difference(name=task.key, reason=problem) if problem else None

        return work

    found: dict[int, Difference] = {}
    done, total = 0, sum(sizes)
    for position, difference in run_tasks(tasks, start, processes=processes):
        if difference is not None:
            found[position] = difference
        done += sizes[position]
        on_progress(done, total)
    return Verdict(
        tensors=len({name.partition("[")[0] for name in names}),
        num_bytes=sum(sizes[len(chunks) :]),
        chunks_checked=len(chunks),
        differences=tuple(found[position] for position in sorted(found)),
    )


def _size(task: _Chunk | str, ours: Weights, theirs: Weights) -> int:
    if isinstance(task, _Chunk):
        return task.box.length
    spec = _spec(ours, task) or _spec(theirs, task)
    assert spec is not None, "each name is one of the two's"
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def _open(path: Path) -> TorchDist | HfSource:
    return open_torch_dist(path) if is_torch_dist(path) else open_hf(path)


def _comparable(a: TorchDist | HfSource, b: TorchDist | HfSource) -> tuple[Weights, Weights]:
    """Both under the same names: Megatron's when both are Megatron's, else Hugging Face's."""
    if isinstance(a, TorchDist) and isinstance(b, TorchDist):
        return RawWeights(a), RawWeights(b)
    config = next(x.config for x in (a, b) if isinstance(x, HfSource))
    return _as_hf(a, config), _as_hf(b, config)


def _as_hf(opened: TorchDist | HfSource, config: Mapping[str, Any]) -> Weights:
    if isinstance(opened, HfSource):
        return HfWeights(opened, scale_block(opened))
    _check_layers(opened, config)
    return _WithCopies(opened, config)


def _check_layers(checkpoint: TorchDist, config: Mapping[str, Any]) -> None:
    """What `import --layers` makes is another model than its source."""
    path = checkpoint.folder.parent / CARRIED / "config.json"
    own = read_json(path).get("num_hidden_layers") if path.is_file() else None
    if own not in (None, config.get("num_hidden_layers")):
        raise CheckpointError(
            f"{checkpoint.folder} holds {own} layers (import --layers), the other {config.get('num_hidden_layers')}: "
            "compare it with what `convert export` makes of it"
        )


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


def _compare(name: str, ours: Weights, theirs: Weights) -> str | None:
    a, b = _spec(ours, name), _spec(theirs, name)
    if a is None or b is None:
        return f"is only in {ours.place if b is None else theirs.place}"
    if a.shape != b.shape:
        return (
            f"has the shape {list(a.shape)} in {ours.place} and {list(b.shape)} in {theirs.place}"
        )
    if a.dtype != b.dtype and {a.dtype, b.dtype} != {"F32", "BF16"}:
        return f"is {a.dtype} in {ours.place} and {b.dtype} in {theirs.place}"
    rows = a.shape[0] if a.shape else 1
    row_bytes = max(1, math.prod(a.shape[1:]) * DTYPES[a.dtype].itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    gap = _Gap()
    for row in range(0, rows, step):
        count = min(step, rows - row)
        x, y = ours.rows(name, row, count), theirs.rows(name, row, count)
        x, y = _same_type(x, a.dtype, b.dtype), _same_type(y, b.dtype, a.dtype)
        if not np.array_equal(x, y):
            gap.add(x, y, "F32" if a.dtype != b.dtype else a.dtype, row)
    return gap.describe(math.prod(a.shape)) if gap.count else None


class _Gap:
    """How far two tensors are apart."""

    def __init__(self) -> None:
        self.count = 0
        self._first_row: int | None = None
        self._largest: float | None = None

    def add(self, x: Array, y: Array, dtype: str, row: int) -> None:
        """Bits of the rows from `row` on."""
        wrong = x != y
        self.count += int(np.count_nonzero(wrong))
        if self._first_row is None:
            self._first_row = row + int(np.argwhere(wrong)[0][0])
        if dtype in WEIGHT_DTYPES:
            with np.errstate(invalid="ignore"):
                distance = np.abs(_values(x[wrong], dtype) - _values(y[wrong], dtype))
            self._largest = max(
                self._largest or 0.0, float(np.nan_to_num(distance, nan=np.inf).max())
            )

    def describe(self, total: int) -> str:
        """For a human."""
        apart = "" if self._largest is None else f", by up to {self._largest:.3g}"
        return f"differs in {self.count} of {total} values{apart}, first in row {self._first_row}"


def _values(bits: Array, dtype: str) -> Array:
    return bits.view(np.float32) if dtype == "F32" else widen(bits.tobytes(), dtype)


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
    for chunk in _chunks(checkpoint):
        yield chunk.key, _problem(reader, chunk)


def _chunks(checkpoint: TorchDist) -> list[_Chunk]:
    """Each once, whichever keys name it, in the order of the files."""
    found = {
        (box.file, box.offset): _Chunk(checkpoint, key, box)
        for key in reversed([*model_keys(checkpoint)])  # of several keys, the first
        for box in checkpoint.tensors[key].boxes
    }
    return [found[place] for place in sorted(found)]


def _problem(reader: BoxReader, chunk: _Chunk) -> str | None:
    try:
        found, stated = reader.crc(chunk.key, chunk.checkpoint.tensors[chunk.key], chunk.box)
    except CheckpointError as error:
        return str(error)
    if stated in (found, 0):
        return None
    file = chunk.checkpoint.folder / chunk.box.file
    return f"{file}: damaged: CRC-32 {found:08x}, stated {stated:08x}"
