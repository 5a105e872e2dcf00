"""What an import will write, decided before a byte is read: chunks, files, offsets. Pure.

The plan depends on the source's headers and the options alone, never on the number of processes or the memory budget;
so a resumed, a one-process and a many-node import write the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_bench.checkpoint.dtypes import DTYPES, WEIGHT_DTYPES
from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.family import Family, holds, list_of, read_sizes, table_of
from moe_bench.checkpoint.fingerprint import digest, tool
from moe_bench.checkpoint.layout import choose_layer_keys
from moe_bench.checkpoint.mapping import (
    Dialect,
    LayerKeys,
    Matrix,
    MegatronTensor,
    ModelMap,
    Piece,
    count_mtp,
    map_model,
)
from moe_bench.checkpoint.safetensors import StoredTensor
from moe_bench.checkpoint.source import HfSource, open_hf, scale_name
from moe_bench.checkpoint.torchsave import framed_length
from moe_bench.errors import CheckpointError

CHUNK_BYTES = 64 << 20
"""Largest chunk: a reader that needs one row reads the whole chunk."""
MIN_UNIT, MAX_UNIT = 4 << 20, 512 << 20
"""Bytes of output in one file: the unit of work, of resuming and of sharing between nodes."""
UNITS_WANTED = 64


class Chunk(NamedTuple):
    """One box of one Megatron tensor."""

    tensor: int
    """Position in the plan's tensors."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    reads: tuple[Piece, ...]
    """Its rows from the top down."""


class PlannedTensor(NamedTuple):
    """One Megatron tensor and its type on disk."""

    tensor: MegatronTensor
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One output file."""

    index: int
    chunks: tuple[Chunk, ...]
    offsets: tuple[int, ...]
    """File offset of each chunk's stream; one more than chunks, the last is the file's size."""

    @property
    def file(self) -> str:
        """Name inside the checkpoint."""
        return f"__{self.index}_0.distcp"

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.offsets[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A whole import."""

    source: HfSource
    model_map: ModelMap
    tensors: tuple[PlannedTensor, ...]
    units: tuple[Unit, ...]
    scale_block: tuple[int, int] | None
    """Rows and columns that share an FP8 scale, when the source is quantised."""
    hash: str
    """Identity of source, options and converter."""

    notes: tuple[str, ...] = ()
    """What the user should know before it runs."""

    @property
    def largest_row(self) -> int:
        """Bytes of the longest row of a matrix: the least that a worker must read at once."""
        return max(
            t.num_bytes // max(1, math.prod(t.shape[:-1]))
            for t in self.source.tensors.values()
            if t.shape
        )

    @property
    def largest_view(self) -> int:
        """Bytes of the largest matrix that is held whole, because its rows lie scattered; 0 when there is none."""
        viewed = (
            (self.source.tensors[piece.name], piece.expert)
            for planned in self.tensors
            for matrix in planned.tensor.matrices
            for piece in matrix.pieces
            if piece.view is not None and not piece.view.packed
        )
        return max(
            (t.num_bytes // (t.shape[0] if expert is not None else 1) for t, expert in viewed),
            default=0,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors and their framing."""
        return sum(unit.num_bytes for unit in self.units)

    @property
    def num_chunks(self) -> int:
        """Chunks over all units."""
        return sum(len(unit.chunks) for unit in self.units)


def plan_import(
    hf: Path,
    *,
    dialect: Dialect = "te",
    layer_keys: LayerKeys | Literal["auto"] = "auto",
    preset: Path | None = None,
    layers: int | None = None,
) -> Plan:
    """Open a Hugging Face model and plan its import, or that of its first `layers` layers without MTP.

    Raises CheckpointError naming tensor and file.
    """
    source = open_hf(hf)
    family = family_of(source.config)
    if layers is not None:
        source = _first_layers(source, family, layers)
    keys = choose_layer_keys(family, layer_keys, preset)
    num_mtp = count_mtp(family, source.config, source.tensors)
    model_map = map_model(family, source.config, dialect=dialect, layer_keys=keys, num_mtp=num_mtp)
    return replace(
        make_plan(source, model_map), notes=tuple(_notes(family, source.config, num_mtp))
    )


def _first_layers(source: HfSource, family: Family, layers: int) -> HfSource:
    """The same model, as if it ended sooner."""
    whole = read_sizes(family, source.config).values["L"]
    if not 0 < layers <= whole:
        raise CheckpointError(f"--layers {layers}: the model has {whole}; give 1 to {whole}")
    config = dict(source.config) | {"num_hidden_layers": layers}
    types = list_of(config, "layer_types")
    if types:
        config["layer_types"] = list(types[:layers])
    if family.mtp_layers:
        config[family.mtp_layers] = 0
    before, after = map(re.escape, family.layer_prefix.split("{layer}"))
    layer_of = re.compile(rf"{before}(\d+){after}").match
    kept = {
        name: tensor
        for name, tensor in source.tensors.items()
        if not (family.mtp_prefix and name.startswith(family.mtp_prefix))
        and ((found := layer_of(name)) is None or int(found[1]) < layers)
    }
    return replace(source, config=config, tensors=kept)


def _notes(family: Family, config: Mapping[str, Any], num_mtp: int) -> Iterator[str]:
    if family.mtp_layers and config.get(family.mtp_layers) and not num_mtp:
        yield (
            f"config.json states {family.mtp_layers} = {config[family.mtp_layers]}, but the weights have no such layer "
            "(transformers drops it when it saves): train without --mtp-num-layers"
        )
    yield from (note for when, note in family.notes.items() if holds(when, config))
    divergence = family.divergence(config)
    if divergence:
        yield divergence


def make_plan(source: HfSource, model_map: ModelMap) -> Plan:
    """Check the source against the family's map, and lay out the output. Raises CheckpointError naming tensor and file."""
    block = scale_block(source)
    _check_source(source, model_map, block)
    tensors = tuple(PlannedTensor(t, _dtype(source.tensors, t)) for t in model_map.tensors)
    chunks = [chunk for i, planned in enumerate(tensors) for chunk in _chunks(i, planned, block)]
    chunks.sort(key=lambda chunk: _place(source.tensors, chunk))
    identity = {
        "tool": tool(),
        "family": model_map.family.name,
        "dialect": model_map.dialect,
        "layer_keys": model_map.layer_keys,
        "config": digest(source.config),
        "files": [(f.name, f.size, f.header_sha256, f.mtime_ns) for f in source.files],
    }
    return Plan(
        source=source,
        model_map=model_map,
        tensors=tensors,
        units=tuple(_units(tensors, chunks)),
        scale_block=block,
        hash=digest(identity),
    )


def scale_block(source: HfSource) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from config.json; None when the source is not FP8."""
    quantized = [name for name, t in source.tensors.items() if t.dtype.startswith("F8")]
    if not quantized:
        return None
    block = table_of(source.config, "quantization_config").get("weight_block_size")
    odd = next((n for n in quantized if source.tensors[n].dtype != "F8_E4M3"), None)
    if odd is not None:
        raise CheckpointError(
            f"{source.tensors[odd].file}: tensor {odd!r} is {source.tensors[odd].dtype}; only F8_E4M3 is read"
        )
    if not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise CheckpointError(
            f"{source.tensors[quantized[0]].file}: tensor {quantized[0]!r} is FP8, but config.json has no "
            "quantization_config.weight_block_size; without it the scales cannot be applied"
        )
    return block[0], block[1]


def _check_source(source: HfSource, model_map: ModelMap, block: tuple[int, int] | None) -> None:
    used = _check_mapped(source, model_map, block) | set(_check_copies(source, model_map))
    ignored = re.compile("|".join(model_map.family.ignored))
    unread = [name for name in source.tensors if name not in used and not ignored.fullmatch(name)]
    if not unread:
        return
    scales = [name for name in unread if name.endswith(("_scale_inv", "_scales"))]
    listed = ", ".join(f"{name!r} ({source.tensors[name].file.name})" for name in unread[:8])
    why = "scales of tensors that are not quantised: " if len(scales) == len(unread) else ""
    raise CheckpointError(
        f"{source.root}: {len(unread)} tensors have no place in family {model_map.family.name!r}: {why}{listed}"
        f"{', ...' if len(unread) > 8 else ''}; config.json does not match the weights, or the model is another one"
    )


def _check_mapped(source: HfSource, model_map: ModelMap, block: tuple[int, int] | None) -> set[str]:
    used = set(model_map.hf_shapes)
    packed = _packed(model_map)
    for name, shape in model_map.hf_shapes.items():
        stored = source.tensors.get(name)
        if stored is None:
            raise CheckpointError(
                f"{source.root}: tensor {name!r} {list(shape)} is missing; config.json asks for it"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} has the shape {list(stored.shape)}, but config.json gives it {list(shape)}"
            )
        if stored.dtype == "F8_E4M3" and block is not None:
            used.add(_check_scale(source, name, stored, block))
        elif name in packed:
            used.add(_check_packed(source, name, stored))
        elif stored.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} is {stored.dtype}; a weight is one of {', '.join(WEIGHT_DTYPES)}"
            )
    return used


def _check_scale(source: HfSource, name: str, stored: StoredTensor, block: tuple[int, int]) -> str:
    own = scale_name(name)
    scale = source.tensors.get(own)
    wanted = tuple(-(-size // b) for size, b in zip(stored.shape, block, strict=False))
    if scale is None:
        raise CheckpointError(
            f"{stored.file}: tensor {name!r} is FP8 and its scale {own!r} is missing; "
            "read without it, the weights would be wrong"
        )
    if scale.dtype != "F32" or scale.shape != wanted or len(stored.shape) != 2:
        raise CheckpointError(
            f"{scale.file}: scale {own!r} is {scale.dtype} {list(scale.shape)}, but {name!r} "
            f"{list(stored.shape)} needs F32 {list(wanted)}"
        )
    return own


def _packed(model_map: ModelMap) -> set[str]:
    """Tensors that hold MXFP4 codes."""
    return {
        piece.name
        for tensor in model_map.tensors
        for matrix in tensor.matrices
        for piece in matrix.pieces
        if piece.view is not None and piece.view.packed
    }


def _check_packed(source: HfSource, name: str, stored: StoredTensor) -> str:
    scale = source.tensors.get(scale_name(name))
    if scale is None:
        raise CheckpointError(
            f"{stored.file}: tensor {name!r} is MXFP4 and its scales {scale_name(name)!r} are missing"
        )
    if (stored.dtype, scale.dtype, scale.shape) != ("U8", "U8", stored.shape[:-1]):
        raise CheckpointError(
            f"{scale.file}: {scale_name(name)!r} is {scale.dtype} {list(scale.shape)}, but {name!r} ({stored.dtype} "
            f"{list(stored.shape)}) needs U8 {list(stored.shape[:-1])}"
        )
    return scale_name(name)


def _check_copies(source: HfSource, model_map: ModelMap) -> list[str]:
    """Redundant tensors that are present; their bytes are compared when the import runs."""
    present = [name for name in model_map.copies if name in source.tensors]
    for name in present:
        original = model_map.copies[name]
        ours, theirs = source.tensors[name], source.tensors[original]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            raise CheckpointError(
                f"{ours.file}: tensor {name!r} must be a copy of {original!r}, but it is "
                f"{ours.dtype} {list(ours.shape)} and not {theirs.dtype} {list(theirs.shape)}"
            )
    return present


def _dtype(source: Mapping[str, StoredTensor], tensor: MegatronTensor) -> str:
    """The type on disk: what Megatron demands, else the source's; FP8 becomes BF16."""
    if tensor.dtype is not None:
        return tensor.dtype
    names = [piece.name for matrix in tensor.matrices for piece in matrix.pieces]
    first = source[names[0]]
    for name in names:
        if source[name].dtype != first.dtype:
            raise CheckpointError(
                f"{source[name].file}: tensor {name!r} is {source[name].dtype}, but {names[0]!r} is {first.dtype}; "
                f"both belong to {tensor.key!r}, which has one type"
            )
    return "BF16" if first.dtype in ("F8_E4M3", "U8") else first.dtype


def _chunks(index: int, planned: PlannedTensor, block: tuple[int, int] | None) -> Iterator[Chunk]:
    """Cut each matrix where Hugging Face's tensors meet (queries, keys and values stay together), then by size."""
    tensor = planned.tensor
    row_bytes = math.prod(tensor.shape[1:]) * DTYPES[planned.dtype].itemsize
    grain = block[0] if block else 1
    limit = max(grain, CHUNK_BYTES // max(1, row_bytes) // grain * grain)
    for matrix in tensor.matrices:
        for start, rows, reads in _sections(matrix):
            for at in range(0, rows, limit):
                count = min(limit, rows - at)
                yield Chunk(
                    index,
                    (*matrix.lead, start + at, *(0 for _ in tensor.shape[1:])),
                    (*(1 for _ in matrix.lead), count, *tensor.shape[1:]),
                    _rows(reads, at, count),
                )


def _sections(matrix: Matrix) -> Iterator[tuple[int, int, tuple[Piece, ...]]]:
    """(first row, rows, pieces) of each part that is one chunk when it is small enough."""
    pieces = matrix.pieces
    if len({piece.name for piece in pieces}) < len(pieces) and pieces[0].view is None:
        yield 0, sum(piece.rows for piece in pieces), pieces
        return
    start = 0
    for piece in pieces:
        yield start, piece.rows, (piece,)
        start += piece.rows


def _rows(reads: tuple[Piece, ...], first: int, count: int) -> tuple[Piece, ...]:
    """Rows first .. first + count of the pieces laid end to end."""
    if first == 0 and count == sum(read.rows for read in reads):
        return reads
    out, at = [], 0
    for read in reads:
        low, high = max(first, at), min(first + count, at + read.rows)
        if low < high:
            out.append(read._replace(first=read.first + low - at, rows=high - low))
        at += read.rows
    return tuple(out)


def _place(tensors: Mapping[str, StoredTensor], chunk: Chunk) -> tuple[str, int, int]:
    """Order of the source's files, so that reading is sequential."""
    first = chunk.reads[0]
    stored = tensors[first.name]
    return stored.file.name, stored.offset, chunk.offsets[-len(stored.shape)] if stored.shape else 0


def _units(tensors: tuple[PlannedTensor, ...], chunks: list[Chunk]) -> Iterator[Unit]:
    total = sum(
        math.prod(chunk.sizes) * DTYPES[tensors[chunk.tensor].dtype].itemsize for chunk in chunks
    )
    wanted = min(MAX_UNIT, max(MIN_UNIT, total // UNITS_WANTED))
    index, taken, offsets = 0, [], [0]
    for chunk in chunks:
        taken.append(chunk)
        length = framed_length(tensors[chunk.tensor].dtype, chunk.sizes, offsets[-1])
        offsets.append(offsets[-1] + length)
        if offsets[-1] >= wanted:
            yield Unit(index=index, chunks=tuple(taken), offsets=tuple(offsets))
            index, taken, offsets = index + 1, [], [0]
    if taken:
        yield Unit(index=index, chunks=tuple(taken), offsets=tuple(offsets))
