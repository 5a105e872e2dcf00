"""Hugging Face -> torch_dist: runs a plan, resumes it, commits it."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_bench.checkpoint.fingerprint import tool
from moe_bench.checkpoint.layout import TRACKER, extra_states
from moe_bench.checkpoint.metadata import Box, Metadata, ObjectEntry, TensorEntry, dump
from moe_bench.checkpoint.open_files import OpenFiles
from moe_bench.checkpoint.output import (
    LEDGER,
    MANIFEST,
    begun,
    check_space,
    is_finished,
    sync_folder,
    write_whole,
)
from moe_bench.checkpoint.plan import Plan, Unit
from moe_bench.checkpoint.side_file import write_scales
from moe_bench.checkpoint.source import CARRIED
from moe_bench.checkpoint.torchsave import object_stream
from moe_bench.checkpoint.workers import Work, run_tasks
from moe_bench.errors import CheckpointError

RELEASE = "release"
OBJECTS = "__objects_0.distcp"
COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False},
}
"""Smallest common state that loads; without checkpoint_version Megatron reorders QKV as it did before version 1."""
_COMPARED_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """How to run; none of it changes the bytes written."""

    processes: int = 2
    memory_bytes: int = 512 << 20
    """Anonymous memory of all processes together."""
    node: int = 0
    """This machine's number, from 0."""
    nodes: int = 1
    """Machines that share the work through the output folder."""
    allow_non_finite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportResult:
    """What became of it."""

    units_written: int
    units_reused: int
    units_elsewhere: int
    """Left to other nodes; the checkpoint is not whole until they are done."""
    num_bytes: int
    """Bytes written by this call."""
    seconds: float


_BASE_BYTES = 28 << 20
"""Anonymous memory of a process that holds no tensor (measured)."""
_PLAN_BYTES_PER_TENSOR = 2200
"""The plan's share of a source tensor, once in the parent and once in the worker that touches its pages (measured)."""
_BUFFERS_PER_PROCESS = 6
"""A block as it is read, as FP8 looks it up (index, table, result), and as it is written."""
_PIECE_BYTES = 1 << 20
"""Read, checked and written while it is in a core's cache; larger pieces are slower (measured)."""


def memory_needed(options: ImportOptions, plan: Plan) -> int:
    """Anonymous bytes, all processes together, that an import of this plan is expected to take at its peak."""
    fixed = _BASE_BYTES * (options.processes + 1) + _PLAN_BYTES_PER_TENSOR * len(
        plan.source.tensors
    )
    each = _BUFFERS_PER_PROCESS * _piece_bytes(plan) + 2 * plan.largest_view
    return fixed + options.processes * each


def check_memory(options: ImportOptions, plan: Plan) -> None:
    """Raises CheckpointError when the budget is too small."""
    needed = memory_needed(options, plan)
    if needed > options.memory_bytes:
        raise CheckpointError(
            f"--memory-mib {options.memory_bytes >> 20} is too little for {options.processes} processes; "
            f"at least {-(-needed >> 20)} are needed (or fewer --processes)"
        )


def _piece_bytes(plan: Plan) -> int:
    """Bytes that a worker reads at once: as many as stay in its cache, but a whole row."""
    return max(_PIECE_BYTES, plan.largest_row)


def run_import(
    plan: Plan,
    out: Path,
    options: ImportOptions,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ImportResult:
    """Write the checkpoint, or what is missing of it. Raises CheckpointError; `out` is then not a checkpoint yet.

    A finished checkpoint of the same plan is left as it is; any other content of `out` is refused.
    """
    started = time.monotonic()
    if is_finished(out, plan.hash, TRACKER):
        return ImportResult(
            units_written=0,
            units_reused=len(plan.units),
            units_elsewhere=0,
            num_bytes=0,
            seconds=0.0,
        )
    with begun(out, plan.hash, options.node) as ledger:
        (out / RELEASE).mkdir(exist_ok=True)
        own = [unit for unit in plan.units if unit.index % options.nodes == options.node]
        todo = [unit for unit in own if _ledger(out, unit) is None]
        check_space(out, sum(unit.num_bytes for unit in todo))
        _check_copies(plan, options.processes)
        _write_units(plan, out, todo, options, on_progress)
        missing = [unit for unit in plan.units if _ledger(out, unit) is None]
        if not missing and not is_finished(out, plan.hash, TRACKER):
            _commit(plan, out, ledger)
    return ImportResult(
        units_written=len(todo),
        units_reused=len(own) - len(todo),
        units_elsewhere=len(missing),
        num_bytes=sum(unit.num_bytes for unit in todo),
        seconds=time.monotonic() - started,
    )


def _ledger(out: Path, unit: Unit) -> list[int] | None:
    """The unit's CRCs if it was finished by this plan and its file is whole, else None."""
    try:
        entry = json.loads((out / LEDGER / f"unit-{unit.index}").read_bytes())
        size = (out / RELEASE / unit.file).stat().st_size
    except (OSError, ValueError):
        return None
    return entry if size == unit.num_bytes and isinstance(entry, list) else None


def _write_units(
    plan: Plan,
    out: Path,
    todo: list[Unit],
    options: ImportOptions,
    on_progress: Callable[[int, int], None],
) -> None:
    if not todo:
        return
    check_memory(options, plan)

    def start() -> Work:
        # numpy is imported by the worker: the parent stays small and single-threaded, so that forking is safe
        from moe_bench.checkpoint.unit_writer import UnitWriter  # noqa: PLC0415

        writer = UnitWriter(
            plan,
            out / RELEASE,
            buffer_bytes=_piece_bytes(plan),
            allow_non_finite=options.allow_non_finite,
        )

        def work(unit: Unit) -> None:
            crcs = writer.write(unit)
            ledger = out / LEDGER
            write_whole(ledger / f"unit-{unit.index}", json.dumps(crcs).encode(), ledger)

        return work

    total, done = sum(unit.num_bytes for unit in todo), 0
    for position, _ in run_tasks(todo, start, processes=options.processes):
        done += todo[position].num_bytes
        on_progress(done, total)


class _Piece(NamedTuple):
    """Bytes of two tensors that must be equal."""

    name: str
    original: str
    offset: int
    num_bytes: int


def _check_copies(plan: Plan, processes: int) -> None:
    """Redundant tensors are dropped only when they equal what they copy. Raises CheckpointError naming both."""
    pieces = list(_copied_pieces(plan))

    def start() -> Work:
        files, buffers = OpenFiles(), (bytearray(_PIECE_BYTES), bytearray(_PIECE_BYTES))
        return lambda piece: _is_equal(plan, piece, files, buffers)

    for position, equal in run_tasks(pieces, start, processes=processes):
        if not equal:
            piece = pieces[position]
            raise CheckpointError(
                f"{plan.source.tensors[piece.name].file}: tensor {piece.name!r} differs from {piece.original!r}, "
                "of which Megatron keeps one copy"
            )


def _copied_pieces(plan: Plan) -> Iterator[_Piece]:
    for name, original in plan.model_map.copies.items():
        size = plan.source.tensors[name].num_bytes if name in plan.source.tensors else 0
        for at in range(0, size, _COMPARED_BYTES):
            yield _Piece(name, original, at, min(_COMPARED_BYTES, size - at))


def _is_equal(
    plan: Plan, piece: _Piece, files: OpenFiles, buffers: tuple[bytearray, bytearray]
) -> bool:
    for at in range(piece.offset, piece.offset + piece.num_bytes, _PIECE_BYTES):
        count = min(_PIECE_BYTES, piece.offset + piece.num_bytes - at)
        for name, buffer in zip((piece.name, piece.original), buffers, strict=True):
            tensor = plan.source.tensors[name]
            if not files.read(tensor.file, tensor.offset + at, memoryview(buffer)[:count]):
                return False
        if buffers[0] != buffers[1]:  # by memcmp; views would compare element by element
            return False
    return True


def _commit(plan: Plan, out: Path, scratch: Path) -> None:
    """Everything that makes the folder a checkpoint, the tracker last. Safe to repeat, alone or by several nodes."""
    release = out / RELEASE
    crcs = [_ledger(out, unit) for unit in plan.units]
    common = object_stream(pickle.dumps([COMMON], protocol=2))
    empty = object_stream(pickle.dumps([None], protocol=2))
    write_whole(release / OBJECTS, empty + common, scratch)
    write_whole(release / "common.pt", object_stream(pickle.dumps(COMMON, protocol=2)), scratch)
    write_whole(release / ".metadata", dump(_metadata(plan, len(empty), len(common))), scratch)
    carried = _carry(plan, out / CARRIED, scratch)
    write_scales(plan, out, scratch)
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_whole(release / "metadata.json", json.dumps(backend).encode(), scratch)
    write_whole(out / MANIFEST, _manifest(plan, crcs, carried), scratch)
    for folder in (release, out):
        sync_folder(folder)
    write_whole(out / TRACKER, RELEASE.encode(), scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def _metadata(plan: Plan, empty_bytes: int, common_bytes: int) -> Metadata:
    boxes: list[list[Box]] = [[] for _ in plan.tensors]
    for unit in plan.units:
        for i, chunk in enumerate(unit.chunks):
            start = unit.offsets[i]
            box = Box(chunk.offsets, chunk.sizes, unit.file, start, unit.offsets[i + 1] - start)
            boxes[chunk.tensor].append(box)
    tensors: dict[str, TensorEntry] = {}
    objects = {"common_state/shard_0_1": ObjectEntry(OBJECTS, empty_bytes, common_bytes)}
    for planned, own in zip(plan.tensors, boxes, strict=True):
        entry = TensorEntry(planned.dtype, planned.tensor.global_shape, tuple(sorted(own)))
        for key in (planned.tensor.key, *planned.tensor.aliases):
            tensors[key] = entry
            for name in extra_states(key, planned.tensor.lead, plan.model_map.dialect):
                objects[name] = ObjectEntry(OBJECTS, 0, empty_bytes)
    return Metadata(tensors, objects)


def _carry(plan: Plan, folder: Path, scratch: Path) -> dict[str, str]:
    """Copy the small files verbatim, config.json as planned; their SHA-256 by name."""
    folder.mkdir(exist_ok=True)
    digests = {}
    for path in plan.source.carried:
        data = path.read_bytes()
        if path.name == "config.json" and json.loads(data) != plan.source.config:
            data = json.dumps(plan.source.config, indent=2).encode()
        write_whole(folder / path.name, data, scratch)
        digests[path.name] = hashlib.sha256(data).hexdigest()
    return digests


def _manifest(plan: Plan, crcs: list[list[int] | None], carried: Mapping[str, str]) -> bytes:
    changed = {
        piece.name: plan.source.tensors[piece.name].dtype
        for planned in plan.tensors
        for matrix in planned.tensor.matrices
        for piece in matrix.pieces
        if plan.source.tensors[piece.name].dtype != planned.dtype
    }
    dropped = [name for name in plan.model_map.copies if name in plan.source.tensors]
    table: dict[str, Any] = {
        "tool": tool(),
        "plan": plan.hash,
        "family": plan.model_map.family.name,
        "dialect": plan.model_map.dialect,
        "layer_keys": plan.model_map.layer_keys,
        "scale_block": plan.scale_block,
        "sources": [
            {"name": f.name, "size": f.size, "header_sha256": f.header_sha256}
            for f in plan.source.files
        ],
        "carried_sha256": dict(carried),
        "source_dtypes": _grouped(changed),
        "dropped_copies": dropped,
        "files": [
            {"name": unit.file, "size": unit.num_bytes, "payload_crc32": crc}
            for unit, crc in zip(plan.units, crcs, strict=True)
        ],
    }
    return json.dumps(table, indent=1).encode()


def _grouped(dtypes: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by type, so that an FP8 model's manifest stays readable."""
    grouped: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        grouped.setdefault(dtype, []).append(name)
    return grouped
