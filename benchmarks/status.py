"""Time of `status` over many runs: `python benchmarks/status.py [runs of the command] [run directories]`.

The run directories are made by the project's own writer, as a job of two ranks leaves them: run.json, job.json, 200 steps
with their experts, events, and logs of some size. A third completed, a third failed, a third still waits.
"""

from __future__ import annotations

import os
import resource
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
    """Medians of whole commands, and how much of it is Python's and the CLI's own start."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            _make(Path(folder) / f"run-{number:03}", number)
        started = [_seconds([sys.executable, "-m", "moe_bench", "status", "--help"])]
        taken = [_seconds([*COMMAND, "--output-path", folder])]
        for _ in range(times):
            started.append(_seconds([sys.executable, "-m", "moe_bench", "status", "--help"]))
            taken.append(_seconds([*COMMAND, "--output-path", folder]))
    print(f"{'':<16} {'wall':>8} {'cpu':>8} {'fastest':>8}  ({times} runs each)")
    for name, both in (("--help", started), (f"{count} runs", taken)):
        wall, cpu = zip(*both[1:], strict=True)
        figures = (statistics.median(wall), statistics.median(cpu), min(wall))
        print(f"status {name:<9} " + " ".join(f"{1e3 * figure:>5.0f} ms" for figure in figures))


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


def _seconds(words: list[str]) -> tuple[float, float]:
    """Of the clock on the wall, and of the processor."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    before, begin_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )
    wall_s, after = time.perf_counter() - begin_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 5,
        int(sys.argv[2]) if len(sys.argv) > 2 else 100,
    )
