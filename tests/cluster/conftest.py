"""A real Slurm of two nodes on this machine, for the tests in this folder."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = HERE / "start_slurm.sh"


@dataclass(frozen=True)
class Cluster:
    """A running cluster and how to talk to it."""

    environment: dict[str, str]
    script_environment: dict[str, str] = field(repr=False)

    def run(
        self, *command: str, check: bool = True, **knobs: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that sees this cluster; `knobs` join its environment."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | knobs,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(
        self, *flags: str, check: bool = True, **knobs: str
    ) -> subprocess.CompletedProcess[str]:
        """`sbatch_benchmarking.sh`, as a user calls it."""
        return self.run("bash", "./sbatch_benchmarking.sh", *flags, check=check, **knobs)

    def state(self, job_id: str) -> str:
        """Slurm's state of a job, one word."""
        said = self.run("squeue", "--states=all", "--noheader", "--format=%T", "--jobs", job_id)
        return said.stdout.split()[0]

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 150) -> str:
        """Poll until the job is in one of `states`; fails with the job's log otherwise."""
        deadline = time.monotonic() + timeout_s
        while (now := self.state(job_id)) not in states:
            ended = now in {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED"}
            if ended or time.monotonic() > deadline:
                detail = self.run("scontrol", "-o", "show", "job", job_id).stdout
                pytest.fail(f"job {job_id} is {now}, not {' or '.join(states)}: {detail}")
            time.sleep(0.3)
        return now

    def node(self, action: str, name: str) -> None:
        """`kill-node` or `start-node` of the fixture's script."""
        subprocess.run([SCRIPT, action, name], env=self.script_environment, check=True, timeout=240)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm with nodes n1 and n2, stopped at the end. Skips, saying why, where it cannot be had."""
    folder = tmp_path_factory.mktemp("slurm")
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_"))
    }
    script = plain | {"SLURM_LOCAL_DIR": str(folder), "SLURM_LOCAL_PORT": "17817"}
    started = subprocess.run(
        [SCRIPT, "start"], env=script, capture_output=True, text=True, check=False
    )
    if started.returncode != 0:
        pytest.skip(f"no Slurm here: {started.stderr.strip().splitlines()[-1]}")
    try:
        environment = plain | {"SLURM_CONF": str(folder / "slurm.conf"), "MOE_BENCH_DEVICE": "cpu"}
        yield Cluster(environment=environment, script_environment=script)
    finally:
        subprocess.run([SCRIPT, "stop"], env=script, check=False, capture_output=True)
