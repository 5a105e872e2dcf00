"""What is in a checkpoint, without reading its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_bench.checkpoint.dtypes import DTYPES
from moe_bench.checkpoint.exporting import detect_layer_keys
from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.flags import megatron_flags
from moe_bench.checkpoint.importing import MANIFEST
from moe_bench.checkpoint.source import HfSource, open_hf, read_json
from moe_bench.checkpoint.torch_dist import TRACKER, TorchDist, model_keys, open_torch_dist
from moe_bench.errors import CheckpointError


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
    if any((path / name).is_file() for name in (TRACKER, "metadata.json", ".metadata")):
        return _torch_dist(open_torch_dist(path))
    return _hugging_face(open_hf(path))


def _hugging_face(source: HfSource) -> Inspection:
    family = family_of(source.config)
    tensors = {name: (t.dtype, t.shape) for name, t in source.tensors.items()}
    facts = {"family": family.name, "files": str(len(source.files))}
    flags: tuple[str, ...] = ()
    try:
        flags = tuple(megatron_flags(family, source.config))
    except CheckpointError as error:  # the weights can be converted all the same
        facts["Megatron flags"] = f"none describe it: {error}"
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
    facts = {
        "folder": checkpoint.folder.name,
        "layer keys": detect_layer_keys(checkpoint.tensors),
        "optimizer state": "present" if len(keys) < len(checkpoint.tensors) else "absent",
        "chunks": str(len(unique)),
    }
    manifest = checkpoint.folder.parent / MANIFEST
    if manifest.is_file():
        table = read_json(manifest)
        facts |= {name: str(table.get(name)) for name in ("family", "dialect")}
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
    )
