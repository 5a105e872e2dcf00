"""What is in a checkpoint, without reading its weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.exporting import detect_layer_keys
from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.flags import megatron_flags
from moe_bench.checkpoint.mapping import LayerKeys
from moe_bench.checkpoint.output import MANIFEST
from moe_bench.checkpoint.source import CARRIED, HfSource, open_hf, read_json
from moe_bench.checkpoint.torch_dist import TorchDist, is_torch_dist, model_keys, open_torch_dist
from moe_bench.errors import CheckpointError
from moe_bench.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """A checkpoint's table of contents."""

    place: Path
    format: str
    """`hugging face` or `torch_dist`."""
    facts: Mapping[str, str]
    """What else is known, by label."""
    parameters: int
    num_bytes: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Type and shape by name."""
    flags: tuple[str, ...] = ()
    """Megatron flags that build this model, where config.json tells."""


def inspect(path: Path) -> Inspection:
    """Raises CheckpointError when the headers or the metadata are damaged."""
    if is_torch_dist(path):
        return _torch_dist(open_torch_dist(path))
    return _hugging_face(open_hf(path))


def _hugging_face(source: HfSource) -> Inspection:
    tensors = {name: (t.dtype, t.shape) for name, t in source.tensors.items()}
    facts = {"files": str(len(source.files)), "types": _types(tensors.values())}
    flags = _describe(source.config, facts)
    return Inspection(
        place=source.root,
        format="hugging face",
        facts=facts,
        parameters=sum(
            math.prod(s) for n, (_, s) in tensors.items() if not n.endswith("_scale_inv")
        ),
        num_bytes=sum(t.num_bytes for t in source.tensors.values()),
        tensors=tensors,
        flags=flags,
    )


def _describe(
    config: Mapping[str, Any], facts: dict[str, str], layer_keys: LayerKeys | None = None
) -> tuple[str, ...]:
    """The Megatron flags of a model. Adds to `facts` which family it is, or why there is none."""
    try:
        family = family_of(config)
        facts["family"] = family.name
        return tuple(megatron_flags(family, config, layer_keys))
    except CheckpointError as error:  # there is a table of contents to show all the same
        facts["Megatron flags" if "family" in facts else "family"] = f"none: {error}"
        return ()


def _torch_dist(checkpoint: TorchDist) -> Inspection:
    keys = list(model_keys(checkpoint))
    tensors = {key: (checkpoint.tensors[key].dtype, checkpoint.tensors[key].shape) for key in keys}
    unique = {
        (box.file, box.offset): box.length for key in keys for box in checkpoint.tensors[key].boxes
    }
    first_keys = {
        checkpoint.tensors[key].boxes[0][2:4]: key
        for key in reversed(keys)
        if checkpoint.tensors[key].boxes
    }
    layer_keys = detect_layer_keys(checkpoint.tensors)
    facts = {
        "folder": checkpoint.folder.name,
        "layer keys": layer_keys,
        "optimizer state": "present" if len(keys) < len(checkpoint.tensors) else "absent",
        "chunks": str(len(unique)),
        "types": _types(tensors[key] for key in first_keys.values()),
    }
    manifest = checkpoint.folder.parent / MANIFEST
    if manifest.is_file():
        facts["dialect"] = str(read_json(manifest).get("dialect"))
    config = checkpoint.folder.parent / CARRIED / "config.json"
    flags = _describe(read_json(config), facts, layer_keys) if config.is_file() else ()
    return Inspection(
        place=checkpoint.folder,
        format="torch_dist",
        facts=facts,
        parameters=sum(math.prod(tensors[key][1]) for key in first_keys.values()),
        num_bytes=sum(
            math.prod(tensors[key][1]) * DTYPES[tensors[key][0]].itemsize
            for key in first_keys.values()
        ),
        tensors=tensors,
        flags=flags,
    )


def _types(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Bytes of each type, most first."""
    sizes = Counter[str]()
    for dtype, shape in tensors:
        sizes[dtype] += math.prod(shape) * DTYPES[dtype].itemsize
    return ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in sizes.most_common())
