"""A sweep on a real Slurm: arrays by node count, a budget that holds, and a second call that goes on."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

from moe_bench.results.reader import read_steps
from moe_bench.results.sweep_record import COMPLETED, read_sweep
from tests.cluster.conftest import Cluster

KNOBS = {
    "CLUSTER": "local",
    "PARTITION": "debug",
    "GPUS_PER_NODE": "1",
    "EXCLUSIVE": "0",
    "RUN_TIME": "00:10:00",
    "EP": "1",
    "SEQ_LEN": "64",
}
FLAGS = ("--mock-data", "--train-iters", "5", "--eval-iters", "0", "--lr-warmup-iters", "1")
SWEEP = (sys.executable, "-m", "moe_bench", "sweep")
GOING_ON = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
VARY = ("--vary", "NNODES=1,2", "--vary", "MBS=2,4", "--id", "arrays", "--budget-node-hours", "0.7")


def wait_for_end(cluster: Cluster, job: str) -> None:
    deadline = time.monotonic() + 200
    while True:
        said = cluster.run(
            "squeue", "--array", "--noheader", "--format=%T", "--jobs", job, check=False
        )
        if said.returncode == 0 and not set(said.stdout.split()) & GOING_ON:
            return
        assert time.monotonic() < deadline, said.stdout + said.stderr
        time.sleep(0.5)


def test_a_sweep_runs_as_arrays_by_node_count_within_its_budget(
    cluster: Cluster, tmp_path: Path
) -> None:
    knobs = KNOBS | {"OUTPUT_PATH": str(tmp_path)}
    folder = tmp_path / "sweeps" / "arrays"
    command = (*SWEEP, "Tiny-Qwen3", "--slurm", *VARY, *FLAGS)
    dry = cluster.run(*command, DRY_RUN="1", **knobs)
    assert not folder.exists()
    said = cluster.run(*command, **knobs).stdout
    jobs = re.findall(r"submitted job (\d+): (\d) points", said)
    assert [count for _, count in jobs] == ["2", "1"], said  # NNODES=1; NNODES=2, of which one fits
    for script in sorted(folder.glob("array-*.sh")):
        assert script.read_text() in dry.stdout, "the dry run shows other bytes than were submitted"
    for job, _ in jobs:
        wait_for_end(cluster, job)
    again = cluster.run(*SWEEP, "--resume", "arrays", **knobs).stdout
    [(last, _)] = re.findall(r"submitted job (\d+): (1) points", again)
    wait_for_end(cluster, last)
    done = cluster.run(*SWEEP, "--resume", "arrays", **knobs).stdout
    assert "nothing to submit; 0 points wait or run" in done
    sweep = read_sweep(folder)
    assert [point.outcome for point in sweep.points] == [COMPLETED] * 4
    assert sweep.node_hours < 0.7
    run_dirs = [folder / point.name for point in sweep.points]
    for point, run_dir in zip(sweep.points, run_dirs, strict=True):
        assert len(read_steps(run_dir).records) == 5
        [submission] = json.loads((run_dir / "job.json").read_text())
        assert submission["job_id"] == point.attempts[0].job_id
        assert (run_dir / "logs" / f"slurm-{submission['job_id']}.log").read_text()
        log = (run_dir / "logs" / "rank-0.log").read_text()
        assert not any(str(other) in log for other in run_dirs if other != run_dir)
    elements = [point.attempts[0].job_id for point in sweep.points]
    assert len(set(elements)) == 4
    assert sorted(str(element).partition("_")[0] for element in elements) == sorted(
        [jobs[0][0], jobs[0][0], jobs[1][0], last]
    )
    status = cluster.run(
        sys.executable, "-m", "moe_bench", "status", "--output-path", str(folder)
    ).stdout
    assert status.count("  completed  ") == 4, status
    summary = (sys.executable, "-m", "moe_bench", "summarize", "arrays")
    assert "winner: point" in cluster.run(*summary, "--output-path", str(tmp_path)).stdout
