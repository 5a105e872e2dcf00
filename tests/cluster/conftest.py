"""A real Slurm of three nodes on this machine, for the tests in this folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = HERE / "start_slurm.sh"
STUB = HERE / "container_stub.c"
ENDED = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED"}


@dataclass(frozen=True)
class Cluster:
    """A running cluster and how to talk to it."""

    environment: dict[str, str]
    script_environment: dict[str, str] = field(repr=False)
    has_container_stub: bool = False

    @property
    def folder(self) -> Path:
        """Where it keeps its configuration, logs and state."""
        return Path(self.script_environment["SLURM_LOCAL_DIR"])

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

    def moe_bench(
        self, *words: str, check: bool = True, **knobs: str
    ) -> subprocess.CompletedProcess[str]:
        """`python -m moe_bench`."""
        return self.run(sys.executable, "-m", "moe_bench", *words, check=check, **knobs)

    def show(self, job_id: str) -> str:
        """`scontrol show job`, on one line."""
        return self.run("scontrol", "-o", "show", "job", job_id).stdout

    def state(self, job_id: str) -> str:
        """Slurm's state of a job, one word."""
        said = self.run("squeue", "--states=all", "--noheader", "--format=%T", "--jobs", job_id)
        return said.stdout.split()[0]

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 150) -> str:
        """Poll until the job is in one of `states`; fails with the job's log otherwise."""
        deadline = time.monotonic() + timeout_s
        while (now := self.state(job_id)) not in states:
            if now in ENDED or time.monotonic() > deadline:
                detail = self.show(job_id)
                log = Path(detail.partition("StdOut=")[2].split()[0])
                said = log.read_text() if log.is_file() else ""
                pytest.fail(f"job {job_id} is {now}, not {' or '.join(states)}: {detail}\n{said}")
            time.sleep(0.3)
        return now

    def node(self, action: str, name: str) -> None:
        """`kill-node` or `start-node` of the fixture's script."""
        subprocess.run([SCRIPT, action, name], env=self.script_environment, check=True, timeout=240)


def plain_environment() -> dict[str, str]:
    """This process's environment without another Slurm's variables."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_"))
    }


def free_ports(count: int) -> int:
    """The first of that many ports in a row that nothing listens on."""
    for first in range(17817, 30000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + count):
                probe = taken.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port))
            return first
    pytest.skip(f"no Slurm here: there are no {count} free ports in a row")


def start(folder: Path, **knobs: str) -> Cluster:
    """A cluster of its own in `folder`. Where no Slurm is installed and none can be, skips and says why."""
    port = free_ports(8)
    can_compile = Path("/usr/include/slurm/spank.h").exists() and shutil.which("cc") is not None
    script = plain_environment() | {"SLURM_LOCAL_DIR": str(folder), "SLURM_LOCAL_PORT": str(port)}
    if can_compile or os.getuid() == 0:
        script["SLURM_LOCAL_SPANK"] = str(STUB)
    script |= knobs
    started = _start(script)
    if started.returncode != 0 and script.pop("SLURM_LOCAL_SPANK", ""):  # it is only for some tests
        started = _start(script)
    if started.returncode != 0:
        _stop(script)
        is_installed = shutil.which("slurmctld", path=f"{script['PATH']}:/usr/sbin:/sbin")
        give_up = pytest.fail if is_installed else pytest.skip
        give_up(f"no Slurm here: {started.stderr.strip().splitlines()[-1]}")
    ours = {"SLURM_CONF": str(folder / "slurm.conf"), "MOE_BENCH_DEVICE": "cpu"}
    ours |= {"MOE_BENCH_PYTHON": sys.executable}
    return Cluster(
        environment=plain_environment() | ours | {"OMP_NUM_THREADS": "1"},
        script_environment=script,
        has_container_stub=bool(script.get("SLURM_LOCAL_SPANK")),
    )


def _start(script: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, "start"], env=script, capture_output=True, text=True, check=False
    )


def stop(cluster: Cluster) -> None:
    """End every process of the cluster."""
    _stop(cluster.script_environment)


def _stop(script: Mapping[str, str]) -> None:
    subprocess.run([SCRIPT, "stop"], env=script, check=False, capture_output=True)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm with nodes n1, n2 and n3, one to spare for when one dies; stopped at the end."""
    started = start(tmp_path_factory.mktemp("slurm"), SLURM_LOCAL_NODES="3")
    try:
        yield started
    finally:
        stop(started)
