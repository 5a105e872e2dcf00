"""A process that keeps its freed memory meets no page faults when it makes the same blocks again."""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK_BYTES, PAGE_BYTES = 40 << 20, 4096


def faults_of_the_second_block() -> int:
    """Make a block, free it, make it again: how many of its pages the kernel had to give anew."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    counted = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(BLOCK_BYTES)
        ctypes.memset(block, 1, BLOCK_BYTES)
        counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        libc.free(block)
    return counted[1]


def in_a_new_process(keeping: bool, **environment: str) -> tuple[bool, int]:
    script = (
        "import os\n"
        "from moe_bench.runtime.heap import keep_freed_memory\n"
        "from tests.unit.runtime.test_heap import faults_of_the_second_block\n"
        f"kept = {keeping} and keep_freed_memory(os.environ)\n"
        "print(int(kept), faults_of_the_second_block())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "1", int(faults)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def has_huge_pages_always() -> bool:
    return HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()


@pytest.mark.skipif(
    has_huge_pages_always(), reason="a fault gives 512 pages: too few to be counted"
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_given_back_without_page_faults() -> None:
    _, faults_without = in_a_new_process(keeping=False)
    kept, faults = in_a_new_process(keeping=True)
    assert kept
    assert faults_without > BLOCK_BYTES // PAGE_BYTES // 2
    assert faults < BLOCK_BYTES // PAGE_BYTES // 100


def test_a_user_who_has_tuned_malloc_is_left_alone() -> None:
    kept, _ = in_a_new_process(keeping=True, MALLOC_TRIM_THRESHOLD_="65536")
    assert not kept
