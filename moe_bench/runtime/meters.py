"""What a rank measures about itself, off the step's critical path."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_bench.results.records import GpuSample
from moe_bench.runtime.nvml import NvmlSampler

_PAGE = 4096


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
