"""NVML's view of one GPU, sampled by a thread of its own. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_bench.results.records import GpuSample
from moe_bench.units import GIB

PERIOD_S = 1.0

_SLOWED = {
    0x08: "the hardware's slowdown",
    0x20: "the driver's thermal limit",
    0x40: "the hardware's thermal limit",
    0x80: "the power brake",
}
"""Bits of NVML's clocks event reasons that a healthy GPU does not have under load; its power cap (0x04) is no fault."""


class NvmlSampler:
    """The latest figures of the GPU with `uuid`, as CUDA spells it: without GPU- or MIG-.

    Without nvidia-ml-py, without NVML, or once the GPU is lost there are no samples, and `complaints` says why. A figure
    that this GPU does not tell (a MIG instance has no power of its own) is None.
    """

    def __init__(self, uuid: str, *, rank: int, period_s: float = PERIOD_S) -> None:
        """Start sampling."""
        self._rank, self._period_s = rank, period_s
        self._latest: GpuSample | None = None
        self._complaints: list[str] = []
        self._said: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(uuid,), name="nvml", daemon=True)
        self._thread.start()

    def latest(self) -> GpuSample | None:
        """The last sample; None when there is none."""
        return self._latest

    def complaints(self) -> list[str]:
        """What is wrong with the GPU or with reading it, each once, since the last call."""
        found, self._complaints = self._complaints, []
        return found

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=2 * self._period_s)

    def _run(self, uuid: str) -> None:
        try:
            import pynvml  # noqa: PLC0415 - optional
        except ModuleNotFoundError:
            self._complain("no power, clocks and utilization: nvidia-ml-py is not installed")
            return
        try:
            pynvml.nvmlInit()
            device = _handle(pynvml, uuid)
            ecc = _uncorrected(pynvml, device)
            while not self._stop.wait(self._period_s):
                self._latest = _sample(pynvml, device, self._rank)
                self._look_at_health(pynvml, device, ecc)
        except pynvml.NVMLError as error:
            self._latest = None
            self._complain(f"no power, clocks and utilization any more: NVML says {error}")

    def _look_at_health(self, nvml: ModuleType, device: Any, ecc_at_start: int | None) -> None:
        for bit, name in _SLOWED.items():
            if (_asked(nvml, _event_reasons, nvml, device) or 0) & bit:
                self._complain(f"clocks are held down by {name}")
        errors = _uncorrected(nvml, device)
        if errors is not None and ecc_at_start is not None and errors > ecc_at_start:
            self._complain("uncorrected memory (ECC) errors since the start")

    def _complain(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._complaints = [*self._complaints, f"GPU of rank {self._rank}: {what}"]


def _handle(nvml: ModuleType, uuid: str) -> Any:
    """By UUID: NVML counts all devices of the machine, torch those that CUDA_VISIBLE_DEVICES leaves, in its order."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}".encode())


def _sample(nvml: ModuleType, device: Any, rank: int) -> GpuSample:
    power_mw = _asked(nvml, nvml.nvmlDeviceGetPowerUsage, device)
    clock_mhz = _asked(nvml, nvml.nvmlDeviceGetClockInfo, device, nvml.NVML_CLOCK_SM)
    rates = _asked(nvml, nvml.nvmlDeviceGetUtilizationRates, device)
    memory = _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, device)
    return GpuSample(
        rank=rank,
        power_w=None if power_mw is None else power_mw / 1e3,
        sm_clock_mhz=None if clock_mhz is None else float(clock_mhz),
        utilization=None if rates is None else rates.gpu / 100,
        memory_used_gib=None if memory is None else memory.used / GIB,
    )


def _event_reasons(nvml: ModuleType, device: Any) -> int:
    """Under the name that drivers before 535 know it by."""
    return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))


def _uncorrected(nvml: ModuleType, device: Any) -> int | None:
    kinds = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    found: int | None = _asked(nvml, nvml.nvmlDeviceGetTotalEccErrors, device, *kinds)
    return found


def _asked(nvml: ModuleType, function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where this GPU or driver does not tell, or not just now. Raises once the GPU is lost."""
    try:
        return function(*arguments)
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
            raise
        return None
