"""Time of deciding: explain and dry run beside Python's own start and `import torch`. `python benchmarks/resolve.py [runs]`.

Measured twice in a copy of the project: with this project's bytecode cached, as after a first use, and compiled anew at each
start, as where PYTHONDONTWRITEBYTECODE is set and was from the beginning. Python's own library and the packages have theirs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PARTS = ("moe_bench", "model_configs", "runtime_configs", "cluster_configs")
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "explain (Tiny-Qwen3)": ["-m", "moe_bench", "explain"],
    "dry run (Tiny-DeepSeek-V3)": ["-m", "moe_bench", "launch", "local", "--mock-data"],
    "explain (DeepSeek-V3)": ["-m", "moe_bench", "explain"],
}
TORCH = {"import torch": ["-c", "import torch"]}
MODELS = {"dry run (Tiny-DeepSeek-V3)": "Tiny-DeepSeek-V3", "explain (DeepSeek-V3)": "DeepSeek-V3"}


def main(runs: int) -> None:
    """Interleaved, so that a busy moment falls on all alike; medians, and the extra over Python's start."""
    with tempfile.TemporaryDirectory() as scratch:
        for cached in (True, False):
            copy = Path(scratch) / ("cached" if cached else "compiled")
            for part in PARTS:
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(PROJECT / part, copy / part, ignore=skip)
            print(f"this project's bytecode {'cached' if cached else 'compiled at each start'}:")
            _table(_measured(runs, copy, cached=cached))


def _measured(runs: int, copy: Path, *, cached: bool) -> dict[str, list[float]]:
    given = {**os.environ, "DRY_RUN": "1", "PYTHONPATH": str(copy)}
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    given |= {} if cached else {"PYTHONDONTWRITEBYTECODE": "1"}
    times: dict[str, list[float]] = {name: [] for name in COMMANDS | TORCH}
    for turn in range(runs + 1):
        for name, words in COMMANDS.items():
            times[name].append(_seconds(words, MODELS.get(name, "Tiny-Qwen3"), given, copy))
        if turn < 3:
            times["import torch"].append(_seconds(TORCH["import torch"], "", given, copy))
    return {name: taken[1:] for name, taken in times.items()}  # the first turn warms the caches


def _table(times: Mapping[str, list[float]]) -> None:
    start_s = statistics.median(times["python -c pass"])
    torch_s = statistics.median(times["import torch"])
    print(
        f"{'command':<28} {'median':>9} {'over start':>11} {'fastest':>9} {'of torch':>9} {'runs':>5}"
    )
    for name, taken in times.items():
        median_s = statistics.median(taken)
        over_ms, of_torch = 1000 * (median_s - start_s), median_s / torch_s
        least_ms = 1000 * (min(taken) - min(times["python -c pass"]))
        print(
            f"{name:<28} {1000 * median_s:>6.0f} ms {over_ms:>8.0f} ms {least_ms:>6.0f} ms {of_torch:>8.1%} {len(taken):>5}"
        )


def _seconds(words: list[str], model: str, given: Mapping[str, str], copy: Path) -> float:
    begin_s = time.perf_counter()
    subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**given, "MODEL": model},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
