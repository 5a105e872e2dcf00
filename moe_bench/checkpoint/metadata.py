"""torch_dist's `.metadata`: written opcode by opcode without torch, and read without running what it names.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`. Reading goes through an allow-list of stand-in
classes, so that nothing outside this module is ever imported or called because a file says so.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_bench.checkpoint.dtypes import BY_TORCH_NAME, DTYPES
from moe_bench.errors import CheckpointError

_MODULE = "torch.distributed.checkpoint.metadata"


DAMAGED_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
"""What an unpickler raises for bytes that no pickler wrote, and a reader for values that are not what they should be."""


class Box(NamedTuple):
    """One chunk: a box of a tensor, and where its stream lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint."""

    dtype: str
    """Safetensors name."""
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class ObjectEntry(NamedTuple):
    """One pickled object of a checkpoint."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """Contents of a `.metadata` file."""

    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]


class _Emitter:
    """Pickle protocol 2, only the opcodes that are needed."""

    def __init__(self) -> None:
        self.parts: list[bytes] = [b"\x80\x02"]
        self._memo: dict[tuple[str, str], int] = {}

    def raw(self, data: bytes) -> None:
        self.parts.append(data)

    def _remembered(self, kind: str, value: str, opcodes: bytes) -> None:
        slot = self._memo.get((kind, value))
        if slot is not None:
            self.raw(b"h" + bytes([slot]) if slot < 256 else b"j" + struct.pack("<I", slot))
            return
        slot = len(self._memo)
        self._memo[kind, value] = slot
        put = b"q" + bytes([slot]) if slot < 256 else b"r" + struct.pack("<I", slot)
        self.raw(opcodes + put)

    def name(self, module: str, name: str) -> None:
        self._remembered("global", f"{module} {name}", f"c{module}\n{name}\n".encode())

    def text(self, value: str) -> None:
        data = value.encode()
        self._remembered("text", value, b"X" + struct.pack("<I", len(data)) + data)

    def integer(self, value: int) -> None:
        if value < 256:
            self.raw(b"K" + bytes([value]))
        elif value < 2**31:
            self.raw(b"J" + struct.pack("<i", value))
        else:
            self.raw(b"\x8a\x08" + struct.pack("<q", value))

    def size(self, values: tuple[int, ...]) -> None:
        """torch.Size(values)."""
        self.name("torch", "Size")
        self.raw(b"(")
        for value in values:
            self.integer(value)
        self.raw(b"t\x85R")

    def instance(self, module: str, name: str) -> None:
        self.name(module, name)
        self.raw(b")\x81")

    def state(self, fields: Iterable[tuple[str, Callable[[], None]]]) -> None:
        """Set the attributes of the instance on top of the stack."""
        self.raw(b"}(")
        for field, emit in fields:
            self.text(field)
            emit()
        self.raw(b"ub")


def dump(metadata: Metadata) -> bytes:
    """The bytes of a `.metadata` file that torch reads as its own."""
    out = _Emitter()
    none = partial(out.raw, b"N")
    out.instance(_MODULE, "Metadata")
    out.state(
        (
            ("state_dict_metadata", partial(_state_dict, out, metadata)),
            ("planner_data", none),
            ("storage_data", partial(_storage, out, metadata)),
            ("storage_meta", partial(_storage_meta, out)),
            ("version", none),
        )
    )
    out.raw(b".")
    return b"".join(out.parts)


def _state_dict(out: _Emitter, metadata: Metadata) -> None:
    out.raw(b"}(")
    for key, tensor in metadata.tensors.items():
        out.text(key)
        out.instance(_MODULE, "TensorStorageMetadata")
        out.state(
            (
                ("properties", partial(_properties, out, tensor.dtype)),
                ("size", partial(out.size, tensor.shape)),
                ("chunks", partial(_chunks, out, tensor.boxes)),
            )
        )
    for key in metadata.objects:
        out.text(key)
        out.instance(_MODULE, "BytesStorageMetadata")
    out.raw(b"u")


def _properties(out: _Emitter, dtype: str) -> None:
    out.instance(_MODULE, "TensorProperties")
    out.raw(b"(")
    out.name("torch", DTYPES[dtype].torch_name)
    out.name("torch.serialization", "_get_layout")
    out.text("torch.strided")
    out.raw(b"\x85R\x89")
    out.name(_MODULE, "_MEM_FORMAT_ENCODING")
    out.integer(0)
    out.raw(b"\x85R\x89tb")


def _chunks(out: _Emitter, boxes: tuple[Box, ...]) -> None:
    out.raw(b"](")
    for box in boxes:
        out.instance(_MODULE, "ChunkStorageMetadata")
        out.state(
            (
                ("offsets", partial(out.size, box.offsets)),
                ("sizes", partial(out.size, box.sizes)),
            )
        )
    out.raw(b"e")


def _storage(out: _Emitter, metadata: Metadata) -> None:
    out.raw(b"}(")
    for key, tensor in metadata.tensors.items():
        for box in tensor.boxes:
            _index(out, key, box.offsets)
            _info(out, box.file, box.offset, box.length)
    for key, entry in metadata.objects.items():
        _index(out, key, None)
        _info(out, entry.file, entry.offset, entry.length)
    out.raw(b"u")


def _index(out: _Emitter, key: str, offsets: tuple[int, ...] | None) -> None:
    out.instance(_MODULE, "MetadataIndex")
    fields: list[tuple[str, Callable[[], None]]] = [
        ("fqn", partial(out.text, key)),
        ("index", partial(out.raw, b"N")),
    ]
    if offsets is not None:
        fields.append(("offset", partial(out.size, offsets)))
    out.state(fields)


def _info(out: _Emitter, file: str, offset: int, length: int) -> None:
    out.instance("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    out.state(
        (
            ("relative_path", partial(out.text, file)),
            ("offset", partial(out.integer, offset)),
            ("length", partial(out.integer, length)),
        )
    )


def _storage_meta(out: _Emitter) -> None:
    out.instance(_MODULE, "StorageMeta")
    none = partial(out.raw, b"N")
    out.state(
        (
            ("checkpoint_id", none),
            ("save_id", none),
            ("load_id", none),
            ("modules", partial(out.raw, b"]")),
        )
    )


class _Record:
    """Stand-in for any of torch's dataclasses: keeps the attributes that the file sets."""

    __slots__ = ("fields", "kind")

    def __init__(self) -> None:
        self.fields: Any = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state

    def get(self, name: str) -> Any:
        if not isinstance(self.fields, dict) or name not in self.fields:
            raise CheckpointError(f"lacks the field {name!r}")
        return self.fields[name]


class _Index(_Record):
    """Stand-in for MetadataIndex: a dictionary key before its state is set, so its hash is its identity."""

    __slots__ = ()


class _TensorRecord(_Record):
    __slots__ = ()


class _BytesRecord(_Record):
    __slots__ = ()


def _first(*values: object) -> object:
    return values[0] if values else None


def _joined(*parts: object) -> str:
    return "/".join(map(str, parts))


_ALLOWED: dict[tuple[str, str], object] = {
    **{
        (_MODULE, name): _Record
        for name in ("Metadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta")
    },
    (_MODULE, "MetadataIndex"): _Index,
    (_MODULE, "TensorStorageMetadata"): _TensorRecord,
    (_MODULE, "BytesStorageMetadata"): _BytesRecord,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _first,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Record,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _first,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): _joined,
    ("pathlib", "Path"): _joined,
    ("pathlib._local", "PosixPath"): _joined,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in BY_TORCH_NAME:
            return _Dtype(BY_TORCH_NAME[name])
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"names {module}.{name}, which no torch_dist metadata needs; it may be an attack and is not read"
            )
        return _ALLOWED[module, name]


class _Dtype(NamedTuple):
    name: str


def load(path: Path) -> Metadata:
    """Read a `.metadata` file of any writer. Raises CheckpointError naming it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        record = _Unpickler(io.BytesIO(raw)).load()
        return _contents(record)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except DAMAGED_PICKLE as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from error


def _contents(record: object) -> Metadata:
    if not isinstance(record, _Record):
        raise CheckpointError("is not a torch_dist metadata")
    places: dict[str, dict[tuple[int, ...] | None, tuple[str, int, int]]] = {}
    for index, info in record.get("storage_data").items():
        place = (
            _inside(info.get("relative_path")),
            _natural(info.get("offset")),
            _natural(info.get("length")),
        )
        offset = index.fields.get("offset")
        places.setdefault(index.get("fqn"), {})[None if offset is None else tuple(offset)] = place
    tensors, objects = {}, {}
    for key, value in record.get("state_dict_metadata").items():
        if isinstance(value, _TensorRecord):
            tensors[key] = _tensor(key, value, places.get(key, {}))
        elif isinstance(value, _BytesRecord) and None in places.get(key, {}):
            objects[key] = ObjectEntry(*places[key][None])
    return Metadata(tensors, objects)


def _inside(name: object) -> str:
    """A file in the checkpoint's own folder; a path that leads out of it is refused."""
    if (
        not isinstance(name, str)
        or name.startswith("/")
        or ".." in Path(name).parts
        or "\0" in name
    ):
        raise CheckpointError(f"names the file {name!r}, outside the checkpoint")
    return name


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise CheckpointError(f"has the impossible offset or length {value!r}")
    return value


def _tensor(
    key: str, value: _Record, places: Mapping[tuple[int, ...] | None, tuple[str, int, int]]
) -> TensorEntry:
    dtype = value.get("properties").fields[0]
    if not isinstance(dtype, _Dtype):
        raise CheckpointError(f"{key!r} has an unknown dtype")
    boxes = []
    for chunk in value.get("chunks"):
        offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        if offsets not in places:
            raise CheckpointError(f"{key!r}: the chunk at {list(offsets)} has no place in any file")
        boxes.append(Box(offsets, sizes, *places[offsets]))
    return TensorEntry(dtype.name, tuple(value.get("size")), tuple(boxes))
