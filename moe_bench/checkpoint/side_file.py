"""The scales of an FP8 source, kept beside the converted checkpoint so that an export can restore it bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

from moe_bench.checkpoint.plan import Plan
from moe_bench.checkpoint.safetensors import build_header

SCALES = "hf_fp8_scales.safetensors"


def write_scales(plan: Plan, out: Path, scratch: Path) -> None:
    """Copy every `*_scale_inv` of the source verbatim into one file."""
    tensors = plan.source.tensors
    used = [name + "_scale_inv" for name in plan.model_map.hf_shapes]
    names = [name for name in used if name in tensors]
    header, _ = build_header([(n, tensors[n].dtype, tensors[n].shape) for n in names])
    temporary = scratch / f"{SCALES}.{os.uname().nodename}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(header)
        for name in names:
            with tensors[name].file.open("rb") as source:
                source.seek(tensors[name].offset)
                file.write(source.read(tensors[name].num_bytes))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(out / SCALES)
