"""torch_dist -> Hugging Face: one safetensors file at a time, each whole or absent, the index last."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.fingerprint import digest, tool
from moe_bench.checkpoint.mapping import (
    LayerKeys,
    MegatronTensor,
    ModelMap,
    count_mtp,
    map_model,
)
from moe_bench.checkpoint.metadata import TensorEntry
from moe_bench.checkpoint.output import (
    MANIFEST,
    begun,
    check_space,
    is_finished,
    sync_folder,
    write_whole,
)
from moe_bench.checkpoint.part_file import PartFile, part_of
from moe_bench.checkpoint.safetensors import StoredTensor, build_header, read_header
from moe_bench.checkpoint.side_file import SCALES
from moe_bench.checkpoint.source import (
    CARRIED,
    INDEX,
    carried_files,
    model_folder,
    read_json,
    scale_name,
)
from moe_bench.checkpoint.torch_dist import TorchDist, open_torch_dist
from moe_bench.checkpoint.workers import Work, run_tasks
from moe_bench.errors import CheckpointError

_SHARD_BYTES = 4 << 30
PORTION_BYTES = 64 << 20
"""Tensors of about so many bytes are written at a time; a tensor is never cut."""
SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to write."""

    processes: int = 2
    dtype: str | None = None
    """BF16 or F32 for every weight; None keeps what the checkpoint holds."""
    fp8: bool = False
    """Restore the FP8 or MXFP4 weights and scales that the checkpoint was imported from."""
    shard_bytes: int | None = None
    """Largest file (a larger tensor has one of its own); None divides as the source's index did, else at 4 GiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutTensor:
    """One tensor of an output file."""

    name: str
    origin: str
    """The tensor whose bytes it has: itself, or what it is a copy of."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def describe(self) -> list[object]:
        """Name, origin, type and shape, for an identity."""
        return [self.name, self.origin, self.dtype, list(self.shape)]


class Portion(NamedTuple):
    """Neighbouring tensors of one output file: what a worker writes at a time."""

    file: str
    first: int
    """Position of the first tensor within the file."""
    num_tensors: int
    num_bytes: int

    def of(self, plan: ExportPlan) -> tuple[OutTensor, ...]:
        """Its tensors."""
        return plan.files[self.file][self.first : self.first + self.num_tensors]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """A whole export."""

    checkpoint: TorchDist
    model_map: ModelMap
    config_folder: Path
    files: Mapping[str, tuple[OutTensor, ...]]
    scales: Mapping[str, StoredTensor]
    scale_block: tuple[int, int] | None

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors."""
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)


def detect_layer_keys(keys: Iterable[str]) -> LayerKeys:
    """Whether a checkpoint has one key for all layers."""
    return (
        "stacked"
        if any(k.startswith("decoder.layers.self_attention.") for k in keys)
        else "per-layer"
    )


def plan_export(megatron: Path, config_folder: Path | None, options: ExportOptions) -> ExportPlan:
    """Raises CheckpointError when the checkpoint and config.json do not describe the same model."""
    checkpoint = open_torch_dist(megatron)
    root = checkpoint.folder.parent if (checkpoint.folder.parent / CARRIED).is_dir() else megatron
    folder = model_folder(config_folder) if config_folder else root / CARRIED
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}/config.json does not exist; name the folder of the model's Hugging Face configuration with --hf"
        )
    config = read_json(folder / "config.json")
    manifest = read_json(root / MANIFEST) if (root / MANIFEST).is_file() else {}
    model_map = map_checkpoint(checkpoint, config, quantized=options.fp8)
    scales = _scales(root) if options.fp8 else {}
    tensors = _out_tensors(checkpoint, model_map, manifest, options, scales)
    weight_map = None
    if (folder / INDEX).is_file() and options.shard_bytes is None:
        weight_map = read_json(folder / INDEX).get("weight_map")
    block = manifest.get("scale_block")
    return ExportPlan(
        checkpoint=checkpoint,
        model_map=model_map,
        config_folder=folder,
        files=_files(tensors, weight_map, options.shard_bytes or _SHARD_BYTES),
        scales=scales,
        scale_block=(block[0], block[1]) if block else None,
    )


def map_checkpoint(
    checkpoint: TorchDist, config: Mapping[str, Any], *, quantized: bool = False
) -> ModelMap:
    """The family's map with the layer keys that the checkpoint has; either dialect's keys will do.

    Names and shapes are those of plain weights, or with `quantized` those of the source that config.json describes.
    """
    if not quantized:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    family = family_of(config)
    has_mtp = any(key.startswith("mtp.layers.") for key in checkpoint.tensors)
    first = family.layer_prefix.replace("{layer}", str(config.get("num_hidden_layers")))
    if family.mtp_prefix:
        first = f"{family.mtp_prefix}layers.0."
    return map_model(
        family,
        config,
        dialect="both" if family.local_spec else "te",
        layer_keys=detect_layer_keys(checkpoint.tensors),
        num_mtp=count_mtp(family, config, [first] if has_mtp else []),
    )


def _scales(root: Path) -> dict[str, StoredTensor]:
    if not (root / SCALES).is_file():
        raise CheckpointError(
            f"--fp8 needs {root / SCALES}, which an import from an FP8 or MXFP4 source writes"
        )
    return read_header(root / SCALES)[0]


def _out_tensors(
    checkpoint: TorchDist,
    model_map: ModelMap,
    manifest: Mapping[str, Any],
    options: ExportOptions,
    scales: Mapping[str, StoredTensor],
) -> dict[str, OutTensor]:
    """Every tensor to write, by name: weights, scales, and the copies that the source had."""
    source_dtypes = {n: d for d, names in manifest.get("source_dtypes", {}).items() for n in names}
    tensors: dict[str, OutTensor] = {}
    for tensor in model_map.tensors:
        entry = _entry(checkpoint, (tensor.key, *tensor.aliases))
        for name in dict.fromkeys(p.name for matrix in tensor.matrices for p in matrix.pieces):
            shape = model_map.hf_shapes[name]
            dtype = tensor.dtype or options.dtype or entry.dtype
            if scale_name(name) in scales:
                dtype = "U8" if name.endswith("_blocks") else "F8_E4M3"
            elif _is_shifted(tensor) and options.dtype is None:
                dtype = source_dtypes.get(name, entry.dtype)
            elif (
                tensor.dtype is not None
                and source_dtypes.get(name) == "BF16"
                and options.dtype is None
            ):
                dtype = "BF16"
            tensors[name] = OutTensor(name=name, origin=name, dtype=dtype, shape=shape)
    for name, scale in scales.items():
        tensors[name] = OutTensor(name=name, origin=name, dtype=scale.dtype, shape=scale.shape)
    dropped = manifest.get("dropped_copies")
    for name, original in model_map.copies.items():
        wanted = name in dropped if dropped is not None else name != "lm_head.weight"
        if wanted:
            base = tensors[original]
            tensors[name] = OutTensor(
                name=name, origin=original, dtype=base.dtype, shape=base.shape
            )
    return tensors


def _is_shifted(tensor: MegatronTensor) -> bool:
    """Whether it was widened only so that Megatron's values keep what the source's had."""
    view = tensor.matrices[0].pieces[0].view
    return view is not None and view.less_one


def _entry(checkpoint: TorchDist, keys: tuple[str, ...]) -> TensorEntry:
    for key in keys:
        if key in checkpoint.tensors:
            return checkpoint.tensors[key]
    raise CheckpointError(
        f"{checkpoint.folder} has no {' nor '.join(map(repr, keys))}; the configuration is another model's"
    )


def _files(
    tensors: Mapping[str, OutTensor], weight_map: object, shard_bytes: int
) -> dict[str, tuple[OutTensor, ...]]:
    """Tensors of each file: as the source's index had them when it names the same ones, else filled up in order."""
    groups: dict[str, list[OutTensor]] = {}
    if isinstance(weight_map, dict) and set(weight_map) == set(tensors):
        for name in weight_map:
            groups.setdefault(str(weight_map[name]), []).append(tensors[name])
    else:
        shards = list(_shards(tensors.values(), shard_bytes))
        for i, shard in enumerate(shards):
            name = (
                f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            )
            groups[name] = shard
    return {name: tuple(groups[name]) for name in sorted(groups)}


def _shards(tensors: Iterable[OutTensor], shard_bytes: int) -> Iterator[list[OutTensor]]:
    shard: list[OutTensor] = []
    size = 0
    for tensor in sorted(tensors, key=lambda t: _natural(t.name)):
        if shard and size + tensor.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    if shard:
        yield shard


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def run_export(
    plan: ExportPlan,
    out: Path,
    options: ExportOptions,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Write the model; return how many files were already there from an interrupted run.

    Raises CheckpointError; `out` then has no index and no config.json, so nothing takes it for a model.
    """
    names = list(plan.files)
    identity = _identity(plan)
    if is_finished(out, identity, MANIFEST):
        return len(names)
    with begun(out, identity) as scratch:
        todo = [name for name in names if not _whole(plan, out / name)]
        check_space(out, sum(file_size(plan, name) for name in todo))
        _write_files(plan, out, todo, options, on_progress)
        _commit(plan, out, identity, scratch)
    return len(names) - len(todo)


def _write_files(
    plan: ExportPlan,
    out: Path,
    todo: list[str],
    options: ExportOptions,
    on_progress: Callable[[int, int], None],
) -> None:
    """Workers write portions, so that even a single file is shared; a file gets its name after its last portion."""
    portions = [portion for name in todo for portion in _portions(plan, name)]
    left = Counter(portion.file for portion in portions)
    total, done = sum(portion.num_bytes for portion in portions), 0
    for name in todo:
        part_of(out / name).unlink(missing_ok=True)

    def start() -> Work:
        # numpy is imported by the worker, so that the parent forks while it has one thread
        from moe_bench.checkpoint.file_writer import FileWriter  # noqa: PLC0415

        return FileWriter(plan, out).write

    for position, _ in run_tasks(portions, start, processes=options.processes):
        portion = portions[position]
        left[portion.file] -= 1
        if not left[portion.file]:
            part = PartFile(out / portion.file, anew=False)
            part.finish(file_size(plan, portion.file))
            part.close()
        done += portion.num_bytes
        on_progress(done, total)


def _portions(plan: ExportPlan, name: str) -> Iterator[Portion]:
    """A file's tensors in groups of about PORTION_BYTES."""
    first = size = 0
    tensors = plan.files[name]
    for i, tensor in enumerate(tensors):
        size += tensor.num_bytes
        if size >= PORTION_BYTES or i + 1 == len(tensors):
            yield Portion(name, first, i + 1 - first, size)
            first, size = i + 1, 0


def _identity(plan: ExportPlan) -> str:
    """What the output depends on: the checkpoint's table of contents and the files asked for."""
    contents = hashlib.sha256((plan.checkpoint.folder / ".metadata").read_bytes()).hexdigest()
    files = {
        name: [tensor.describe() for tensor in tensors] for name, tensors in plan.files.items()
    }
    return digest({"tool": tool(), "checkpoint": contents, "files": files})


def header_of(plan: ExportPlan, name: str) -> tuple[bytes, dict[str, int]]:
    """Header and offsets of an output file."""
    return build_header([(t.name, t.dtype, t.shape) for t in plan.files[name]])


def file_size(plan: ExportPlan, name: str) -> int:
    """Bytes of an output file."""
    header, _ = header_of(plan, name)
    return len(header) + sum(tensor.num_bytes for tensor in plan.files[name])


def _whole(plan: ExportPlan, path: Path) -> bool:
    return path.exists() and path.stat().st_size == file_size(plan, path.name)


def _commit(plan: ExportPlan, out: Path, identity: str, scratch: Path) -> None:
    """What makes the folder a model: the carried files, the index, config.json; the manifest last."""
    for path in carried_files(plan.config_folder):
        if path.name not in (INDEX, "config.json"):
            write_whole(out / path.name, path.read_bytes(), scratch)
    if list(plan.files) != [SINGLE]:
        weight_map = {t.name: file for file, tensors in plan.files.items() for t in tensors}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        write_whole(out / INDEX, json.dumps(index, indent=2).encode(), scratch)
    write_whole(out / "config.json", _config(plan), scratch)
    manifest = {
        "tool": tool(),
        "plan": identity,
        "family": plan.model_map.family.name,
        "checkpoint": plan.checkpoint.folder.name,
        "files": [{"name": name, "size": file_size(plan, name)} for name in plan.files],
    }
    sync_folder(out)
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode(), scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def _config(plan: ExportPlan) -> bytes:
    """config.json verbatim; without its quantisation when the weights are no longer quantised."""
    raw = (plan.config_folder / "config.json").read_bytes()
    config = json.loads(raw)
    if plan.scales or "quantization_config" not in config:
        return raw
    del config["quantization_config"]
    return json.dumps(config, indent=2).encode()
