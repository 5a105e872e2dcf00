"""A Hugging Face model on disk: a folder, the hub cache's layout, or a single safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.checkpoint.layout import TRACKER
from moe_bench.checkpoint.output import MANIFEST
from moe_bench.checkpoint.safetensors import StoredTensor, read_header
from moe_bench.errors import CheckpointError

INDEX = "model.safetensors.index.json"
CARRIED = "hf"
"""Folder in a converted checkpoint for the files carried along."""
_CARRIED_SUFFIXES = (".json", ".model", ".txt", ".py", ".jinja", ".tiktoken", ".md")
_CARRIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "tokenizer.model")
"""Files that travel verbatim: configuration, tokenizer, chat template, model code, licence text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """One weight file."""

    name: str
    size: int
    """Bytes."""
    header_sha256: str
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HfSource:
    """Headers and configuration of a Hugging Face model; no weight has been read."""

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: tuple[SourceFile, ...]
    carried: tuple[Path, ...]
    """Files to copy verbatim, sorted."""


def open_hf(path: Path) -> HfSource:
    """Read config.json, the index and every header. Raises CheckpointError naming file and tensor."""
    try:
        return _opened(path)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror}"
        ) from error


def _opened(path: Path) -> HfSource:
    root = path if path.is_file() else model_folder(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file; give one, or the model's folder")
    folder = root if root.is_dir() else root.parent
    config = read_json(folder / "config.json")
    names = [root.name] if root.is_file() else _weight_files(root)
    tensors: dict[str, StoredTensor] = {}
    files: list[SourceFile] = []
    for name in names:
        found, raw = read_header(folder / name)
        _add(tensors, found)
        stat = (folder / name).stat()
        digest = hashlib.sha256(raw).hexdigest()
        files.append(
            SourceFile(
                name=name, size=stat.st_size, header_sha256=digest, mtime_ns=stat.st_mtime_ns
            )
        )
    if root.is_dir():
        _check_index(root / INDEX, tensors)
    return HfSource(
        root=folder,
        config=config,
        tensors=tensors,
        files=tuple(files),
        carried=carried_files(folder),
    )


def carried_files(folder: Path) -> tuple[Path, ...]:
    """Configuration, tokenizer, code and licence files of a model folder, sorted by name."""
    return tuple(
        sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST and _is_carried(p))
    )


def _is_carried(path: Path) -> bool:
    return path.suffix in _CARRIED_SUFFIXES or path.name.startswith(_CARRIED_STEMS)


def scale_name(name: str) -> str:
    """The tensor that holds a quantised tensor's scales: of FP8 `..._scale_inv`, of MXFP4 `..._blocks` `..._scales`."""
    stem = name.removesuffix("_blocks")
    return name + "_scale_inv" if stem == name else stem + "_scales"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table. Raises CheckpointError naming the file."""
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; it is needed to read the model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a JSON table")
    return table


def model_folder(path: Path) -> Path:
    """The folder meant by a path; a hub cache entry means the snapshot that its `refs/main` names."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a folder on this machine (`hf download` fetches a model of the hub into one)"
        )
    if (path / TRACKER).is_file():
        raise CheckpointError(f"{path} is a Megatron checkpoint; `convert export` reads those")
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    ref = path / "refs" / "main"
    if ref.is_file():
        return snapshots / ref.read_text().strip()
    found = sorted(p for p in snapshots.iterdir() if p.is_dir())
    if len(found) != 1:
        raise CheckpointError(
            f"{path} holds {len(found)} snapshots and no refs/main; name one of {snapshots}/*"
        )
    return found[0]


def _weight_files(root: Path) -> list[str]:
    present = sorted(p.name for p in root.glob("*.safetensors"))
    if not (root / INDEX).is_file():
        if not present:
            raise CheckpointError(
                f"{root} has no *.safetensors; pickled .bin weights are not read, because reading them runs code"
            )
        return present
    wanted = sorted(set(_weight_map(root / INDEX).values()))
    for name in wanted:
        if not (root / name).is_file():
            raise CheckpointError(
                f"{root / INDEX} names {name!r}, which is missing; fetch it again"
            )
    return wanted


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not _plain_names(table.values()):
        raise CheckpointError(
            f"{index}: weight_map must map tensor names to file names in the same folder"
        )
    return table


def _plain_names(names: Iterable[object]) -> bool:
    try:
        different = set(names)
    except TypeError:
        return False
    return all(
        isinstance(n, str) and n.endswith(".safetensors") and "/" not in n for n in different
    )


def _add(tensors: dict[str, StoredTensor], found: Mapping[str, StoredTensor]) -> None:
    for name, tensor in found.items():
        if name in tensors:
            raise CheckpointError(
                f"tensor {name!r} is in both {tensors[name].file} and {tensor.file}; remove one file"
            )
        tensors[name] = tensor


def _check_index(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if not index.is_file():
        return
    weight_map = _weight_map(index)
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index} says that {name!r} is in {file!r}, but no header has it"
            )
        if tensors[name].file.name != file:
            raise CheckpointError(
                f"{index} says that {name!r} is in {file!r}, but it is in {tensors[name].file.name!r}"
            )
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise CheckpointError(f"{tensors[extra].file} holds {extra!r}, which {index} does not list")
