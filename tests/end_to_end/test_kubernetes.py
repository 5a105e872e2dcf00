"""A run on Kubernetes as its user sees it: the pods' own commands run here, two nodes, one of them told to go in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.results.reader import read_events, read_steps
from tests.support.clusters import kubectl_on_path
from tests.support.projects import REPOSITORY

STEPS = 150
PATIENCE_S = 300


def moe_bench(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", *words],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def user(tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        "PATH": f"{kubectl_on_path(tmp_path / 'bin')}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "FAKE_CLUSTER": str(tmp_path / "cluster"),
        "FAKE_CLUSTER_RUNS": "1",
        "FAKE_CLUSTER_OWNER": str(os.getpid()),
        "MODEL": "Tiny-Qwen3",
        "CLUSTER": "local",
        "MOE_BENCH_DEVICE": "cpu",
        "MCORE_RELEASE_VERSION": "0.19.2",
        "NNODES": "2",
        "GPUS_PER_NODE": "1",
        "EP": "2",
        "SEQ_LEN": "64",
        "TRAIN_ITERS": str(STEPS),
        "RUN_ID": "run",
        "OUTPUT_PATH": str(tmp_path / "runs"),
        "CONTAINER_IMAGE": "registry.example/moe:1",
        "K8S_VOLUMES": f"host:{tmp_path}:{tmp_path}",
        "K8S_WORKSPACE": str(REPOSITORY),
        "MASTER_PORT": str(20000 + os.getpid() % 10000),
    } | more


def wait_for(what: str, holds: object, tmp_path: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            said = "\n".join(
                f"== {path}\n{path.read_text()[-3000:]}"
                for path in sorted((tmp_path / "cluster").glob("*.log"))
            )
            pytest.fail(f"waited {PATIENCE_S} s for {what}\n{said}")
        time.sleep(0.2)


@pytest.mark.slow
def test_an_evicted_pod_ends_at_a_checkpoint_and_the_run_goes_on_from_it(tmp_path: Path) -> None:
    environment = user(tmp_path)
    flags = ("--mock-data", "--eval-iters", "0", "--save-interval", "1000")
    done = moe_bench("launch", "kubernetes", *flags, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "submitted job default/job/moe-run" in done.stdout
    run_dir = tmp_path / "runs" / "run"
    try:
        wait_for("ten steps", lambda: len(read_steps(run_dir).records) >= 10, tmp_path)
        os.kill(int((tmp_path / "cluster" / "pod-1.pid").read_text()), signal.SIGTERM)
        status = moe_bench("status", "run", environment=environment)
        assert "job default/job/moe-run" in status.stdout, status.stdout + status.stderr
        job = tmp_path / "cluster" / "Job-default-moe-run.json"
        wait_for("the job's end", lambda: "status" in json.loads(job.read_text()), tmp_path)
        status = moe_bench("status", "run", environment=environment)
        assert "completed  job default/job/moe-run" in status.stdout, status.stdout
    finally:
        moe_bench("cancel", "run", environment=environment)
    log = (tmp_path / "cluster" / "moe-run-1.log").read_text()
    assert "pod 1 is told to stop" in log, log
    for index in (0, 1):
        pod = (tmp_path / "cluster" / f"moe-run-{index}.log").read_text()
        assert "stopped with steps left: exit 75" in pod, pod
        assert "lm loss" in (run_dir / "logs" / f"rank-{index}.log").read_text() or index == 0
    steps = [step.step for step in read_steps(run_dir).records]
    assert steps == list(range(1, STEPS + 1)), "every step once, none lost"
    ends = [e.fields["outcome"] for e in read_events(run_dir).records if e.event == "end"]
    assert ends == ["stopped", "completed"]
    said = moe_bench("logs", "run", "--rank", "1", environment=environment)
    assert "iteration" in said.stdout
