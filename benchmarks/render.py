"""Time of rendering a Slurm submission: `python benchmarks/render.py [runs]`.

Whole commands, as a user starts them, interleaved with Python's own start: the dry run through sbatch_benchmarking.sh, and
the same without its bash. The modules that a rendering imports are listed where torch, Megatron or numpy is among them.
"""

from __future__ import annotations

import os
import resource
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
    """Medians, interleaved so that a busy moment falls on all alike; the processor's time says less of other work."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, words in COMMANDS.items():
            times[name].append(_seconds(words))
    print(
        f"{'DeepSeek-V3, 128 nodes':<34} {'wall':>8} {'cpu':>8} {'fastest':>8}  ({runs} runs each)"
    )
    for name, taken in times.items():
        wall, cpu = zip(*taken[1:], strict=True)
        figures = (statistics.median(wall), statistics.median(cpu), min(wall))
        print(f"{name:<34} " + " ".join(f"{1e3 * figure:>5.0f} ms" for figure in figures))
    print(f"imported of {', '.join(HEAVY)}: {', '.join(_imported()) or 'none'}")


def _environment() -> dict[str, str]:
    return {**os.environ, **KNOBS, "MOE_BENCH_PYTHON": sys.executable, "PYTHONPATH": str(PROJECT)}


def _seconds(words: list[str]) -> tuple[float, float]:
    """Of the clock on the wall, and of the processor."""
    before, begin_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        words, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    wall_s, after = time.perf_counter() - begin_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _imported() -> list[str]:
    words = [sys.executable, "-X", "importtime", *LAUNCH[1:]]
    said = subprocess.run(words, env=_environment(), capture_output=True, text=True, check=True)
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in said.stderr.splitlines()}
    return sorted(modules & set(HEAVY))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
