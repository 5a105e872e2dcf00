"""A sweep as a real job array: each element has a run directory of its own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.jobs import FLAGS, KNOBS, losses, status


@pytest.mark.timeout(300)
def test_the_points_of_an_array_share_no_log_and_no_record(
    cluster: Cluster, tmp_path: Path
) -> None:
    knobs = KNOBS | {"OUTPUT_PATH": str(tmp_path), "NNODES": "1", "EP": "1", "CLUSTER": "local"}
    said = cluster.moe_bench(
        *("sweep", "Tiny-Qwen3", "--slurm", "--id", "pair", "--vary", "MBS=2,4"),
        *(*FLAGS, "--train-iters", "3"),
        **knobs,
    )
    points = sorted(path.parent for path in tmp_path.rglob("run.json"))
    assert len(points) == 2, said
    wait_for_steps(cluster, points)
    jobs = {json.loads((point / "job.json").read_text())[-1]["job_id"] for point in points}
    assert len(jobs) == 2
    assert len({job.split("_")[0] for job in jobs}) == 1, jobs  # elements of one array
    for point in points:
        assert len(losses(point)) == 3
        assert (point / "logs" / "rank-0.log").is_file()
        others = [str(other) for other in points if other != point]
        log = (point / "logs" / "rank-0.log").read_text()
        assert not any(other in log for other in others)
        assert "completed" in status(cluster, point)


def wait_for_steps(cluster: Cluster, points: list[Path]) -> None:
    """Until every point has completed."""
    deadline = time.monotonic() + 240
    while not all("  completed" in status(cluster, point) for point in points):
        shown = "\n".join(status(cluster, point) for point in points)
        assert time.monotonic() < deadline, shown
        assert "failed" not in shown, shown
        time.sleep(1)
