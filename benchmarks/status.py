"""Time of `status` over many runs: `python benchmarks/status.py [runs of the command] [run directories]`.

The run directories are made by the project's own writer, as a job of two ranks leaves them: run.json, job.json, 200 steps
with their experts, events, and logs of some size. A third completed, a third failed, a third still waits.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_bench.launch.job import record_submission
from moe_bench.launch.launcher import JobHandle, LaunchPlan
from tests.support.recorded import write_manifest, write_run

PROJECT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "moe_bench", "status", "--most", "0"]
STEPS = 200
LINES = 2000
"""Of each log."""


def main(times: int, count: int) -> None:
    """Medians and the slowest of whole commands, and how much of it is Python's and the CLI's own start."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            _make(Path(folder) / f"run-{number:03}", number)
        started = [_seconds([sys.executable, "-m", "moe_bench", "status", "--help"])]
        taken = [_seconds([*COMMAND, "--output-path", folder])]
        for _ in range(times):
            started.append(_seconds([sys.executable, "-m", "moe_bench", "status", "--help"]))
            taken.append(_seconds([*COMMAND, "--output-path", folder]))
    for name, seconds in (("--help", started[1:]), (f"{count} runs", taken[1:])):
        print(
            f"status {name:<9} {1e3 * statistics.median(seconds):>6.0f} ms, slowest {1e3 * max(seconds):.0f} ms "
            f"(first {1e3 * (started if name == '--help' else taken)[0]:.0f} ms)"
        )


def _make(run_dir: Path, number: int) -> None:
    (run_dir / "logs").mkdir(parents=True)
    if number % 3 == 2:
        write_manifest(run_dir)
    else:
        write_run(run_dir, num_steps=STEPS, finished=number % 3 == 0)
    plan = LaunchPlan(launcher="slurm", filename="launch.sh", script="#!/bin/bash\n")
    job_id = str(1000 + number)
    record_submission(run_dir, plan, JobHandle(launcher="slurm", job_id=job_id))
    said = "iteration, loss and throughput as Megatron prints them, one line a step\n" * LINES
    for rank in (0, 1):
        (run_dir / "logs" / f"rank-{rank}.log").write_text(said)
    failed = "RuntimeError: CUDA out of memory\n" if number % 3 == 1 else ""
    (run_dir / "logs" / "rank-1.log").write_text(said + failed)
    ended = "moe_bench: srun ended with 1\n" if number % 3 == 1 else ""
    (run_dir / "logs" / f"slurm-{job_id}.log").write_text(
        f"moe_bench: job {job_id}, restart 0, nodes n[1-2]\n{ended}"
    )


def _seconds(words: list[str]) -> float:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    begin_s = time.perf_counter()
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin_s


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 5,
        int(sys.argv[2]) if len(sys.argv) > 2 else 100,
    )
