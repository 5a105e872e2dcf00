"""How a CPU rank's memory is got from the kernel: every step makes and frees the same tensors."""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping

MMAP_THRESHOLD_BYTES = 1 << 30
"""Blocks up to this size come from the heap; glibc gives each of more than 32 MiB a mapping of its own."""
TRIM_THRESHOLD_BYTES = (1 << 31) - 1
"""How much may lie free at the heap's end before it goes back; mallopt takes an int."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: MutableMapping[str, str]) -> bool:
    """Keep freed blocks for the next step, and lay large tensors on huge pages. Before torch is imported.

    Otherwise glibc returns them, and each step meets thousands of page faults (docs/cpu.md has the figures). Forked
    ranks inherit it. Does nothing, and returns False, where the user has tuned malloc or the C library has no mallopt.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # c10/core/impl/alloc_cpu.cpp, torch 2.11
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in environment for name in _OF_THE_USER):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )
