"""The scales of an FP8 or MXFP4 source, kept beside the converted checkpoint so that an export can restore it bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

from moe_bench.checkpoint.plan import Plan
from moe_bench.checkpoint.safetensors import build_header
from moe_bench.checkpoint.source import scale_name

SCALES = "hf_fp8_scales.safetensors"


def write_scales(plan: Plan, out: Path, scratch: Path) -> None:
    """Copy every scale of the source verbatim into one file, if there are any."""
    tensors = plan.source.tensors
    used = [scale_name(name) for name in plan.model_map.hf_shapes]
    names = [name for name in used if name in tensors]
    if not names:
        return
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
