"""Time of deciding: explain and dry run beside Python's own start and `import torch`. `python benchmarks/resolve.py [runs]`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "explain (Tiny-Qwen3)": ["-m", "moe_bench", "explain"],
    "dry run (Tiny-DeepSeek-V3)": ["-m", "moe_bench", "launch", "local", "--mock-data"],
    "explain (DeepSeek-V3)": ["-m", "moe_bench", "explain"],
    "import torch": ["-c", "import torch"],
}
MODELS = {"dry run (Tiny-DeepSeek-V3)": "Tiny-DeepSeek-V3", "explain (DeepSeek-V3)": "DeepSeek-V3"}


def main(runs: int) -> None:
    """Interleaved, so that a busy moment falls on all alike; medians, and the extra over Python's start."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, words in COMMANDS.items():
            times[name].append(_seconds(words, MODELS.get(name, "Tiny-Qwen3")))
    start_s = statistics.median(times["python -c pass"])
    torch_s = statistics.median(times["import torch"])
    print(
        f"{'command':<28} {'median':>9} {'over start':>11} {'of torch':>9}  ({runs} runs each, interleaved)"
    )
    for name, taken in times.items():
        median_s = statistics.median(taken)
        over_ms, of_torch = 1000 * (median_s - start_s), median_s / torch_s
        print(f"{name:<28} {1000 * median_s:>6.0f} ms {over_ms:>8.0f} ms {of_torch:>8.1%}")


def _seconds(words: list[str], model: str) -> float:
    given = {**os.environ, "MODEL": model, "DRY_RUN": "1", "PYTHONPATH": str(PROJECT)}
    begin_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *words],
        env=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
