"""What a rank measures about itself, off the step's critical path."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from moe_bench.results.records import GpuSample
from moe_bench.units import GIB

PERIOD_S = 1.0
_PAGE = 4096


class CpuMeters:
    """The resident set of this process."""

    def memory_bytes(self) -> float:
        """Resident bytes."""
        return float(Path("/proc/self/statm").read_text().split()[1]) * _PAGE

    def gpu(self) -> GpuSample | None:
        """There is none."""
        return None

    def close(self) -> None:
        """Nothing to close."""


class GpuMeters:
    """torch's peak of allocated memory, and NVML's view, sampled once a second by a thread of its own."""

    def __init__(self, rank: int) -> None:
        """Start sampling this thread's current device. Without nvidia-ml-py there are no samples."""
        self._rank = rank
        self._latest: GpuSample | None = None
        self._stop = threading.Event()
        # By UUID: NVML counts all devices of the machine, torch those that CUDA_VISIBLE_DEVICES leaves, in its order.
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._thread = threading.Thread(target=self._sample, args=(uuid,), name="nvml", daemon=True)
        self._thread.start()

    def memory_bytes(self) -> float:
        """Peak allocated bytes."""
        return float(torch.cuda.max_memory_allocated())

    def gpu(self) -> GpuSample | None:
        """The latest sample."""
        return self._latest

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=2 * PERIOD_S)

    def _sample(self, uuid: str) -> None:
        try:
            import pynvml  # noqa: PLC0415 - optional
        except ModuleNotFoundError:
            return
        try:
            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            while not self._stop.wait(PERIOD_S):
                self._latest = GpuSample(
                    rank=self._rank,
                    power_w=pynvml.nvmlDeviceGetPowerUsage(device) / 1e3,
                    sm_clock_mhz=float(pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)),
                    utilization=pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
                    memory_used_gib=pynvml.nvmlDeviceGetMemoryInfo(device).used / GIB,
                )
        except pynvml.NVMLError:
            self._latest = None  # a container without NVML: the record has no samples


def meters(rank: int, *, on_cpu: bool) -> CpuMeters | GpuMeters:
    """For this process, whose device is set."""
    return CpuMeters() if on_cpu else GpuMeters(rank)
