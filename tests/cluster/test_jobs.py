"""Real jobs on a real Slurm: two nodes, srun, gloo."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import pytest

from moe_bench.results.reader import read_events, read_steps
from tests.cluster.conftest import Cluster

KNOBS = {
    "MODEL": "Tiny-Qwen3",
    "CLUSTER": "local",
    "PARTITION": "debug",
    "NNODES": "2",
    "GPUS_PER_NODE": "1",
    "EXCLUSIVE": "0",
    "RUN_TIME": "00:10:00",
    "RUN_NAME": "test",
}
FLAGS = ("--mock-data", "--eval-iters", "0", "--eval-interval", "1000", "--seq-length", "64")


def submit(
    cluster: Cluster, base: Path, run_id: str, *flags: str, **knobs: str
) -> tuple[str, Path]:
    """(job id, run directory) of a submitted run."""
    knobs = KNOBS | {"OUTPUT_PATH": str(base), "RUN_ID": run_id} | knobs
    said = cluster.submit(*FLAGS, *flags, **knobs).stdout
    found = re.search(r"submitted job (\d+)", said)
    assert found, said
    return found[1], base / run_id


def losses(run_dir: Path) -> list[float]:
    return [step.losses["lm loss"] for step in read_steps(run_dir).records]


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while len(read_steps(run_dir).records) < step:
        assert time.monotonic() < deadline, (
            f"{run_dir} made {len(read_steps(run_dir).records)} steps"
        )
        time.sleep(0.2)


def status(cluster: Cluster, run_dir: Path) -> str:
    python = Path(cluster.environment.get("MOE_BENCH_PYTHON", ".venv/bin/python"))
    verb = ("-m", "moe_bench", "status", run_dir.name, "--output-path", str(run_dir.parent))
    return cluster.run(str(python), *verb).stdout


@pytest.mark.timeout(240)
def test_a_job_over_two_nodes_trains_and_leaves_its_record(
    cluster: Cluster, tmp_path: Path
) -> None:
    job, run_dir = submit(cluster, tmp_path, "two-nodes", "--train-iters", "6")
    cluster.wait_for(job, "COMPLETED")
    assert len(losses(run_dir)) == 6
    hosts = cluster.run("scontrol", "-o", "show", "job", job).stdout
    assert "NumNodes=2" in hosts
    submission = json.loads((run_dir / "job.json").read_text())[-1]
    script = (run_dir / submission["script"]).read_bytes()
    assert submission["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert "completed" in status(cluster, run_dir)
    assert (run_dir / "logs" / "rank-0.log").is_file()
    assert (run_dir / "logs" / "rank-1.log").is_file()


def test_a_dry_run_prints_the_bytes_that_a_submission_stores(
    cluster: Cluster, tmp_path: Path
) -> None:
    knobs = KNOBS | {"OUTPUT_PATH": str(tmp_path), "RUN_ID": "same"}
    dry = cluster.submit(*FLAGS, "--train-iters", "6", DRY_RUN="1", **knobs)
    assert not (tmp_path / "same").exists()
    job, run_dir = submit(cluster, tmp_path, "same", "--train-iters", "6")
    cluster.run("scancel", job)
    assert (run_dir / "launch.sh").read_text() == dry.stdout
    assert hashlib.sha256(dry.stdout.encode()).hexdigest() in dry.stderr


@pytest.mark.timeout(400)
def test_a_warned_job_saves_requeues_and_ends_with_the_losses_of_an_unbroken_one(
    cluster: Cluster, tmp_path: Path
) -> None:
    saving = ("--train-iters", "24", "--save-interval", "1000")

    def run(name: str) -> tuple[str, Path]:
        return submit(
            cluster, tmp_path, name, *saving, "--save", str(tmp_path / name / "checkpoints")
        )

    job, broken = run("broken")
    wait_for_step(broken, 4)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "COMPLETED", timeout_s=240)
    assert "Restarts=1" in cluster.run("scontrol", "-o", "show", "job", job).stdout
    loaded = [e for e in read_events(broken).records if e.event == "checkpoint_loaded"]
    assert loaded
    assert 4 <= int(str(loaded[-1].fields["step"])) < 24
    job, unbroken = run("unbroken")
    cluster.wait_for(job, "COMPLETED", timeout_s=240)
    assert losses(broken) == losses(unbroken)


@pytest.mark.timeout(240)
def test_a_killed_rank_fails_the_job_and_status_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job, run_dir = submit(cluster, tmp_path, "killed", "--train-iters", "100000")
    wait_for_step(run_dir, 2)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    deadline = time.monotonic() + 60
    while cluster.state(job) not in {"FAILED", "CANCELLED"}:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    said = status(cluster, run_dir)
    assert "completed" not in said
    assert "job" in said


@pytest.mark.timeout(120)
def test_a_job_that_cannot_start_says_why_and_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        job, run_dir = submit(cluster, tmp_path, "waiting", "--train-iters", "6")
        time.sleep(3)
        assert "pending" in status(cluster, run_dir)
        cancel = ("-m", "moe_bench", "cancel", run_dir.name, "--output-path", str(tmp_path))
        assert f"job {job} cancelled" in cluster.run(".venv/bin/python", *cancel).stdout
        assert cluster.state(job) == "CANCELLED"
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"PARTITION": "nowhere"}, "sinfo -s"),
        ({"NODELIST": "n9"}, "Invalid node name"),
        ({"SEGMENT": "2"}, "unset SEGMENT"),
        ({"CONTAINER_IMAGE": "/images/x.sqsh"}, "failed|pyxis"),
    ],
)
def test_what_slurm_refuses_is_explained(
    knobs: dict[str, str], said: str, cluster: Cluster, tmp_path: Path
) -> None:
    base = KNOBS | {"OUTPUT_PATH": str(tmp_path), "RUN_ID": "refused"}
    done = cluster.submit(*FLAGS, "--train-iters", "6", check=False, **(base | knobs))
    if "CONTAINER_IMAGE" in knobs:  # known only within the job: sbatch itself takes the script
        assert done.returncode == 0
        job = re.search(r"submitted job (\d+)", done.stdout)
        assert job
        cluster.wait_for(job[1], "FAILED", timeout_s=30)
        return
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
