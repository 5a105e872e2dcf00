"""What this machine has, found without torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

_NVIDIA_DEVICE = re.compile(r"nvidia\d+\Z")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a local launch can use."""

    device: str
    """cpu or cuda."""
    gpus: int
    """CUDA devices this process may use; 0 on a CPU."""
    cores: int
    """CPU cores this process may use."""
    torch: bool = True
    """Whether this interpreter can run ranks; a login node's may be set up for submitting only."""
    transformer_engine: bool = True
    """Whether it has Transformer Engine."""
    apex: bool = True
    """Whether it has Apex's kernel that adds a weight's gradient to its fp32 sum."""
    nsys: bool = True
    """Whether Nsight Systems is on PATH."""


def probe(environment: Mapping[str, str], *, devices: Path = Path("/dev")) -> Machine:
    """Counts /dev/nvidiaN, less what CUDA_VISIBLE_DEVICES hides; MOE_BENCH_DEVICE=cpu|cuda overrides."""
    gpus = _gpus(environment, devices)
    device = environment.get("MOE_BENCH_DEVICE") or ("cuda" if gpus else "cpu")
    return Machine(
        device=device,
        gpus=max(gpus, 1) if device == "cuda" else 0,
        cores=len(os.sched_getaffinity(0)),
        torch=importlib.util.find_spec("torch") is not None,
        transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        nsys=shutil.which("nsys") is not None,
    )


def device_files(devices: Path = Path("/dev")) -> int:
    """How many GPUs the driver shows in /dev; Windows' Linux subsystem has one paravirtual device."""
    found = sum(1 for path in devices.glob("nvidia*") if _NVIDIA_DEVICE.match(path.name))
    return found or int((devices / "dxg").exists())


def _gpus(environment: Mapping[str, str], devices: Path) -> int:
    found = device_files(devices)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))
