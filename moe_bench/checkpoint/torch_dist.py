"""A torch_dist checkpoint of any writer, read row by row without torch and without trusting it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from moe_bench.checkpoint.arithmetic import BITS, Array
from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.layout import TRACKER
from moe_bench.checkpoint.metadata import Box, Metadata, TensorEntry, load
from moe_bench.checkpoint.open_files import OpenFiles
from moe_bench.checkpoint.torchsave import Stored, ZipWindow, parse
from moe_bench.errors import CheckpointError


def is_torch_dist(path: Path) -> bool:
    """Whether a folder is meant as a torch_dist checkpoint rather than a Hugging Face model."""
    return any((path / name).is_file() for name in (TRACKER, "metadata.json", ".metadata"))


def iteration_folder(path: Path) -> Path:
    """The folder that holds `.metadata`: `path` itself, or the iteration that its tracker names."""
    if (path / "metadata.json").is_file() or (path / ".metadata").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{path} is not a torch_dist checkpoint: no {TRACKER} and no metadata.json "
            "(a half-written one has no tracker)"
        )
    name = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if name != "release" and not name.isdecimal():
        raise CheckpointError(f"{tracker} says {name!r}; expected 'release' or an iteration number")
    folder = path / ("release" if name == "release" else f"iter_{int(name):07d}")
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            f"{tracker} names {folder.name}, which has no metadata.json: it was never finished, or it is a legacy "
            "(torch) checkpoint; let Megatron rewrite a legacy one with --ckpt-convert-format torch_dist"
        )
    return folder


@dataclass(frozen=True, slots=True)
class TorchDist:
    """An opened checkpoint: its table of contents."""

    folder: Path
    metadata: Metadata

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Model tensors and whatever else is there (optimizer state keys start with `optimizer` or `chained_`)."""
        return self.metadata.tensors


def open_torch_dist(path: Path) -> TorchDist:
    """Read the table of contents. Raises CheckpointError for another format, a damaged or a hostile file."""
    folder = iteration_folder(path)
    stated = folder / "metadata.json"
    try:
        backend = json.loads(stated.read_bytes()).get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{stated}: cannot be read: {error}") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{stated}: the backend is {backend!r}; only torch_dist is read")
    return TorchDist(folder, load(folder / ".metadata"))


class Extent(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    num_bytes: int


class _Place(NamedTuple):
    """Bytes of a box's stream."""

    offset: int
    num_bytes: int


class BoxReader:
    """Reads rows of a checkpoint's tensors. Not shared between processes."""

    def __init__(self, checkpoint: TorchDist) -> None:
        self._checkpoint = checkpoint
        self._files = OpenFiles()
        self._stored: dict[tuple[str, int], Stored] = {}
        self._by_lead: dict[tuple[str, int], dict[tuple[int, ...], list[Box]]] = {}

    def rows(self, key: str, lead: tuple[int, ...], first: int, count: int) -> Array:
        """Rows first .. first + count of the matrix at `lead`, as unsigned integers of the element's size.

        Raises CheckpointError when the boxes do not cover them.
        """
        entry = self._checkpoint.tensors[key]
        axis = len(lead)
        kind = BITS[DTYPES[entry.dtype].itemsize]
        out = np.empty((count, *entry.shape[axis + 1 :]), kind)
        extents = self.extents(key, lead, first, count)
        if extents is not None:
            self._fill(out, extents)
            return out
        filled = 0
        for box in self._boxes(key, axis).get(lead, ()):
            low = max(first, box.offsets[axis])
            high = min(first + count, box.offsets[axis] + box.sizes[axis])
            if low < high:
                columns = tuple(
                    slice(o, o + s)
                    for o, s in zip(box.offsets[axis + 1 :], box.sizes[axis + 1 :], strict=True)
                )
                part = self._box_rows(key, entry, box, lead, low - box.offsets[axis], high - low)
                out[(slice(low - first, high - first), *columns)] = part
                filled += part.size
        if filled != out.size:
            raise CheckpointError(
                f"{self._checkpoint.folder}: {key!r} at {list(lead)}, rows {first}..{first + count}: "
                f"the chunks hold {filled} of {out.size} elements"
            )
        return out

    def _fill(self, out: Array, extents: list[Extent]) -> None:
        raw, at = memoryview(out.reshape(-1).view(np.uint8)), 0
        for extent in extents:
            if not self._files.read(extent.file, extent.offset, raw[at : at + extent.num_bytes]):
                raise CheckpointError(f"{extent.file}: ends inside a chunk")
            at += extent.num_bytes

    def extents(
        self, key: str, lead: tuple[int, ...], first: int, count: int
    ) -> list[Extent] | None:
        """Where the same rows lie as they are, in order; None when the boxes cut columns, overlap or leave a gap."""
        entry = self._checkpoint.tensors[key]
        axis, at, found = len(lead), first, list[Extent]()
        boxes = self._boxes(key, axis).get(lead, ())
        for box in sorted(boxes, key=lambda box: box.offsets[axis]):
            low = max(first, box.offsets[axis])
            high = min(first + count, box.offsets[axis] + box.sizes[axis])
            if low >= high:
                continue
            if low != at or tuple(box.sizes[axis + 1 :]) != tuple(entry.shape[axis + 1 :]):
                return None
            place = self._place(key, entry, box, lead, low - box.offsets[axis], high - low)
            found.append(
                Extent(
                    self._checkpoint.folder / box.file, box.offset + place.offset, place.num_bytes
                )
            )
            at = high
        return found if at == first + count else None

    def _boxes(self, key: str, axis: int) -> Mapping[tuple[int, ...], list[Box]]:
        """Boxes of a tensor by each leading position that they contain."""
        if (key, axis) not in self._by_lead:
            table: dict[tuple[int, ...], list[Box]] = {}
            for box in self._checkpoint.tensors[key].boxes:
                for place in np.ndindex(*box.sizes[:axis]):
                    lead = tuple(int(o + p) for o, p in zip(box.offsets, place, strict=False))
                    table.setdefault(lead, []).append(box)
            self._by_lead[key, axis] = table
        return self._by_lead[key, axis]

    def _box_rows(
        self, key: str, entry: TensorEntry, box: Box, lead: tuple[int, ...], first: int, count: int
    ) -> Array:
        place = self._place(key, entry, box, lead, first, count)
        raw = self._pread(box, place.offset, place.num_bytes)
        kind = BITS[DTYPES[entry.dtype].itemsize]
        return np.frombuffer(raw, kind).reshape(count, *box.sizes[len(lead) + 1 :])

    def _place(
        self, key: str, entry: TensorEntry, box: Box, lead: tuple[int, ...], first: int, count: int
    ) -> _Place:
        axis = len(lead)
        stored = self.stored(key, entry, box)
        row_bytes = math.prod(box.sizes[axis + 1 :]) * DTYPES[entry.dtype].itemsize
        slab = 0
        for at, offset, size in zip(lead, box.offsets, box.sizes, strict=False):
            slab = slab * size + at - offset
        start = (slab * box.sizes[axis] + first) * row_bytes
        return _Place(stored.offset + start, count * row_bytes)

    def stored(self, key: str, entry: TensorEntry, box: Box) -> Stored:
        """Where a box's payload lies. Raises CheckpointError when it is not what the metadata says."""
        if (box.file, box.offset) not in self._stored:
            try:
                fd, size = self._files.opened(self._checkpoint.folder / box.file)
                if box.offset + box.length > size:
                    raise CheckpointError(
                        f"is cut off: {size} bytes, a chunk ends at {box.offset + box.length}"
                    )
                stored = parse(ZipWindow(fd, box.offset, box.length))
            except OSError as error:
                raise CheckpointError(
                    f"{self._checkpoint.folder / box.file}: {key!r}: cannot be read: {error.strerror}"
                ) from error
            except CheckpointError as error:
                raise CheckpointError(
                    f"{self._checkpoint.folder / box.file}: {key!r}: {error}"
                ) from error
            self._stored[box.file, box.offset] = stored
        stored = self._stored[box.file, box.offset]
        shape = tuple(size for size in stored.shape if size != 1)
        if stored.dtype != entry.dtype or shape != tuple(s for s in box.sizes if s != 1):
            raise CheckpointError(
                f"{self._checkpoint.folder / box.file}: {key!r}: the chunk is {stored.dtype} {list(stored.shape)}, "
                f"the metadata says {entry.dtype} {list(box.sizes)}"
            )
        return stored

    def crc(self, key: str, entry: TensorEntry, box: Box) -> tuple[int, int]:
        """CRC-32 of a box's storage as it is, and as its zip states it."""
        stored = self.stored(key, entry, box)
        crc, step = 0, 4 << 20
        for at in range(0, stored.num_bytes, step):
            crc = crc32(
                self._pread(box, stored.storage + at, min(step, stored.num_bytes - at)), crc
            )
        return crc, stored.crc

    def _pread(self, box: Box, offset: int, length: int) -> memoryview:
        path = self._checkpoint.folder / box.file
        data = memoryview(np.empty(length, np.uint8))
        if not self._files.read(path, box.offset + offset, data):
            raise CheckpointError(f"{path}: ends inside a chunk")
        return data


def model_keys(checkpoint: TorchDist) -> Iterator[str]:
    """Keys of weights: everything but optimizer state."""
    for key in checkpoint.tensors:
        if not key.startswith(("optimizer.", "chained_", "rerun_state_machine", "rng_state")):
            yield key
