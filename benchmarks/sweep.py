"""Time to plan and render a sweep of 1,000 points, beside Python's own start. `python benchmarks/sweep.py [runs]`."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).parents[1]
GBS = ",".join(str(1024 * n) for n in range(1, 11))
LRS = ",".join(f"{n}e-6" for n in range(1, 51))
SWEEP = ["-m", "moe_bench", "sweep", "DeepSeek-V3", "--slurm", "--dry-run"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "1 point": [*SWEEP, "--vary", "MBS=1"],
    "1,000 points, knobs and a flag": [
        *SWEEP, "--vary", "EP=32,64", "--vary", "PP=8,16", "--vary", "MBS=1,2,4,8,16", f"--vary=--lr={LRS}",
    ],
    "1,000 points, knobs alone": [
        *SWEEP, "--vary", "TP=1,2,4,8", "--vary", "PP=4,8,16,32,64", "--vary", "EP=8,16,32,64,128",
        "--vary", f"GBS={GBS}",
    ],
}  # fmt: skip
"""The second shares few environments of the .conf programs among many points; the third has one for each point."""


def main(runs: int) -> None:
    """Interleaved, so that a busy moment falls on all alike; medians, and the ratio to Python's start."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    cpu: dict[str, list[float]] = {name: [] for name in COMMANDS}
    rendered: dict[str, tuple[int, int]] = {}
    for _ in range(runs):
        for name, words in COMMANDS.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds, rendered[name] = _run(words)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times[name].append(seconds)
            cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    start_s = statistics.median(times["python -c pass"])
    print(
        f"{'command':<32} {'legal':>6} {'scripts':>8} {'median':>9} {'x start':>8} {'CPU':>7}  ({runs} runs each, interleaved)"
    )
    for name, taken in times.items():
        median_s = statistics.median(taken)
        legal, scripts_kib = rendered[name]
        print(
            f"{name:<32} {legal:>6} {scripts_kib:>4} KiB {median_s:>7.2f} s {median_s / start_s:>7.0f}x"
            f" {statistics.median(cpu[name]):>5.2f} s"
        )


def _run(words: list[str]) -> tuple[float, tuple[int, int]]:
    """Wall time; how many points could run, and the size of what was rendered."""
    with tempfile.TemporaryDirectory() as folder:
        given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        given |= {"PYTHONPATH": str(PROJECT), "CLUSTER": "local", "OUTPUT_PATH": folder}
        given |= {"ACCOUNT": "bench", "PARTITION": "batch", "DATA_PATH": "/data/corpus"}
        begin_s = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], env=given, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - begin_s
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return seconds, (done.stdout.count("/launch.sh  sha256 "), len(done.stdout) // 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
