"""What a rank measures about itself, off the step's critical path."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from moe_bench.results.records import GpuSample
from moe_bench.runtime.nvml import NvmlSampler

_PAGE = os.sysconf("SC_PAGE_SIZE")


class CpuMeters:
    """The resident set of this process."""

    def memory_bytes(self) -> float:
        """Resident bytes."""
        return float(Path("/proc/self/statm").read_text().split()[1]) * _PAGE

    def gpu(self) -> GpuSample | None:
        """There is none."""
        return None

    def complaints(self) -> list[str]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing to close."""


class GpuMeters:
    """torch's peak of allocated memory, and NVML's view of this process's current device."""

    def __init__(self, rank: int) -> None:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        self._nvml = NvmlSampler(str(uuid), rank=rank)

    def memory_bytes(self) -> float:
        """Peak allocated bytes."""
        return float(torch.cuda.max_memory_allocated())

    def gpu(self) -> GpuSample | None:
        """The latest sample."""
        return self._nvml.latest()

    def complaints(self) -> list[str]:
        """What is wrong with the GPU or with reading it, since the last call."""
        return self._nvml.complaints()

    def close(self) -> None:
        """Stop sampling."""
        self._nvml.close()


def meters(rank: int, *, on_cpu: bool) -> CpuMeters | GpuMeters:
    """For this process, whose device is set."""
    return CpuMeters() if on_cpu else GpuMeters(rank)


def processor() -> str:
    """The CPU's name as the kernel tells it, and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def began_unix_s(*, by_torchrun: bool) -> float | None:
    """When this process, or the elastic agent above it, started; None where /proc does not say."""
    pid = os.getppid() if by_torchrun else os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    age_s = uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, proc_pid_stat(5)
    return time.time() - age_s if age_s >= 0 else None
