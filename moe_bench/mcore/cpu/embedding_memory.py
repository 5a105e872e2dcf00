"""Memory: what a device would report as allocated is this process's resident set."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def resident_bytes(*_args: Any, **_kwargs: Any) -> int:
    """Resident set of this process."""
    return _status_bytes("VmRSS")


def peak_resident_bytes(*_args: Any, **_kwargs: Any) -> int:
    """Largest resident set since the start, or since `reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak(*_args: Any, **_kwargs: Any) -> None:
    """Start the peak anew (Linux: proc(5), clear_refs). Where the kernel forbids it the peak stays since start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except PermissionError:
        return


def memory_stats(*_args: Any, **_kwargs: Any) -> dict[str, int]:
    """The keys of torch that Megatron reads, others 0."""
    now, peak = resident_bytes(), peak_resident_bytes()
    stats: dict[str, int] = defaultdict(int)
    for kind in ("allocated_bytes", "reserved_bytes", "active_bytes"):
        stats[f"{kind}.all.current"] = now
        stats[f"{kind}.all.peak"] = peak
    return stats


def mem_get_info(*_args: Any, **_kwargs: Any) -> tuple[int, int]:
    """(available, total) bytes of the machine."""
    return _meminfo_bytes("MemAvailable"), total_memory_bytes()


def total_memory_bytes() -> int:
    """The machine's memory."""
    return _meminfo_bytes("MemTotal")


def _status_bytes(field: str) -> int:
    return _kib(_STATUS, field)


def _meminfo_bytes(field: str) -> int:
    return _kib(Path("/proc/meminfo"), field)


def _kib(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
