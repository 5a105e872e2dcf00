"""Time of rendering a Slurm submission: `python benchmarks/render.py [runs]`.

Whole commands, as a user starts them, interleaved with Python's own start: the dry run through sbatch_benchmarking.sh, and
the same without its bash. The modules that a rendering imports are listed where torch, Megatron or numpy is among them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "moe_bench", "launch", "slurm"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -m moe_bench launch slurm": LAUNCH,
    "bash ./sbatch_benchmarking.sh": ["bash", str(PROJECT / "sbatch_benchmarking.sh")],
}
KNOBS = {
    "MODEL": "DeepSeek-V3",
    "CLUSTER": "local",
    "ACCOUNT": "account",
    "PARTITION": "batch",
    "RUN_NAME": "render",
    "DATA_PATH": "/data/text",
    "TOKENIZER_MODEL": "/data/tokenizer",
    "LOAD_PATH": "/data/checkpoint",
    "CONTAINER_IMAGE": "/images/moe.sqsh",
    "CONTAINER_MOUNTS": "/data:/data",
    "DRY_RUN": "1",
}
HEAVY = ("torch", "megatron", "numpy")


def main(runs: int) -> None:
    """Medians and the slowest, interleaved so that a busy moment falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, words in COMMANDS.items():
            times[name].append(_seconds(words))
    print(f"{'DeepSeek-V3, 128 nodes':<34} {'median':>8} {'slowest':>8}  ({runs} runs each)")
    for name, taken in times.items():
        warm = taken[1:]
        print(f"{name:<34} {1e3 * statistics.median(warm):>5.0f} ms {1e3 * max(warm):>5.0f} ms")
    print(f"imported of {', '.join(HEAVY)}: {', '.join(_imported()) or 'none'}")


def _environment() -> dict[str, str]:
    return {**os.environ, **KNOBS, "MOE_BENCH_PYTHON": sys.executable, "PYTHONPATH": str(PROJECT)}


def _seconds(words: list[str]) -> float:
    begin_s = time.perf_counter()
    subprocess.run(
        words, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    return time.perf_counter() - begin_s


def _imported() -> list[str]:
    words = [sys.executable, "-X", "importtime", *LAUNCH[1:]]
    said = subprocess.run(words, env=_environment(), capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in said.stderr.splitlines()}
    return sorted(modules & set(HEAVY))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
