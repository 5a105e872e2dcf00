"""Jobs that are stopped from outside and go on: their losses are those of one that never was."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import ENDED, Cluster
from tests.cluster.jobs import (
    events,
    last_step,
    losses,
    status,
    steps,
    submit,
    wait_for_step,
)

ENDLESS = ("--train-iters", "20000")
OFTEN = 20
SELDOM = 10_000
"""Steps between a run's regular checkpoints: a few seconds, and longer than any test."""
GOES_ON = 5
"""Steps after the resumption that are compared."""


def submit_saving(
    cluster: Cluster, base: Path, name: str, interval: int, **knobs: str
) -> tuple[str, Path]:
    """A run that would train for hours and saves every `interval` steps."""
    every = ("--save-interval", str(interval))
    save = () if "DEPENDENCY" in knobs else ("--save", str(base / name / "checkpoints"))
    return submit(cluster, base, name, *ENDLESS, *every, *save, **knobs)


class Unbroken:
    """The same training, never stopped: it runs beside a test, for as long as its losses are asked for."""

    def __init__(self, cluster: Cluster, base: Path) -> None:
        self._cluster = cluster
        self._base = base
        self._known: list[float] = []
        self._begun = 0
        self._run: tuple[str, Path] | None = None

    def begin(self) -> tuple[str, Path]:
        """(job id, run directory); submits it unless it runs."""
        if self._run is None:
            self._begun += 1
            name = f"unbroken-{self._begun}"
            self._run = submit(self._cluster, self._base, name, *ENDLESS, NODELIST="n1,n3")
        return self._run

    def first(self, count: int) -> list[float]:
        """The losses of its first steps; it ends there, and begins again only where more are asked for."""
        if len(self._known) < count:
            _, run_dir = self.begin()
            wait_for_step(run_dir, max(count, 100), timeout_s=240)
            self._known = losses(run_dir)
            self.end()
        return self._known[:count]

    def end(self) -> None:
        if self._run is not None:
            self._cluster.run("scancel", self._run[0])
            self._run = None


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unbroken]:
    beside = Unbroken(cluster, tmp_path_factory.mktemp("unbroken"))
    yield beside
    beside.end()


def loaded_steps(run_dir: Path) -> list[int]:
    """The step of each checkpoint that the run went on from."""
    return [int(str(event.fields["step"])) for event in events(run_dir, "checkpoint_loaded")]


def job_log(run_dir: Path, job: str) -> str:
    """What the job's script has said; nothing before it starts."""
    path = run_dir / "logs" / f"slurm-{job}.log"
    return path.read_text() if path.exists() else ""


def resumption(cluster: Cluster, job: str, run_dir: Path, timeout_s: float) -> int:
    """The step that the job went on from, as soon as it has; fails when the job ends without."""
    deadline = time.monotonic() + timeout_s
    while not loaded_steps(run_dir):
        ended = cluster.state(job) in ENDED
        is_late = time.monotonic() > deadline
        assert not ended, f"{cluster.show(job)}\n{job_log(run_dir, job)}"
        assert not is_late, f"{cluster.show(job)}\n{job_log(run_dir, job)}"
        time.sleep(0.5)
    (step,) = loaded_steps(run_dir)
    return step


@pytest.mark.timeout(1200)
def test_a_job_warned_of_its_time_limit_saves_and_goes_on_with_the_same_losses(
    cluster: Cluster, tmp_path: Path, unbroken: Unbroken
) -> None:
    """A real RUN_TIME, and Slurm's own warning before it: up to a minute earlier than asked for, so two minutes.

    No regular checkpoint is due before hours: what it goes on from was saved because of the warning.
    """
    limit = {"RUN_TIME": "00:02:00", "SIGNAL_BEFORE_S": "50"}
    job, run_dir = submit_saving(cluster, tmp_path, "limited", SELDOM, **limit)
    wait_for_step(run_dir, 1)
    unbroken.begin()
    resumed_at = resumption(cluster, job, run_dir, timeout_s=400)
    wait_for_step(run_dir, resumed_at + GOES_ON)
    shown = cluster.show(job)
    cluster.run("scancel", job)
    assert "TimeLimit=00:02:00" in shown
    assert re.search(r"Restarts=[1-9]", shown), shown
    log = job_log(run_dir, job)
    assert "Slurm is about to end the job (time limit, preemption): asking for a checkpoint" in log
    assert "stopped with steps left: requeueing job" in log
    assert "DUE TO TIME LIMIT" not in log
    made = losses(run_dir)[: resumed_at + GOES_ON]
    assert 0 < resumed_at < SELDOM
    assert made == unbroken.first(resumed_at + GOES_ON)


@pytest.mark.parametrize(
    "runs_script", [pytest.param(False), pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1200)
def test_a_dead_node_is_named_and_the_job_goes_on_from_its_checkpoint(
    cluster: Cluster, tmp_path: Path, unbroken: Unbroken, runs_script: bool
) -> None:
    """slurmd and the ranks under it are gone at once, as with a node that loses its power.

    Where the node ran the job's script, too, nobody is left to write Slurm's words into the job's log.
    """
    job, run_dir = submit_saving(cluster, tmp_path, "bereft", OFTEN)
    wait_for_step(run_dir, OFTEN + 5)
    script_host, other = nodes_of(cluster, job)
    dead = script_host if runs_script else other
    (spare,) = {"n1", "n2", "n3"} - {script_host, other}
    try:
        with drained(cluster, spare):  # so that the job cannot start before `status` was asked
            cluster.node("kill-node", dead)
            deadline = time.monotonic() + 150
            while cluster.state(job) != "PENDING":
                assert time.monotonic() < deadline, cluster.show(job)
                time.sleep(0.5)
            said = status(cluster, run_dir)
            assert said.startswith("bereft  pending"), said
            assert f"Node failure on {dead}" in said, f"{said}\n{job_log(run_dir, job)}"
        resumed_at = resumption(cluster, job, run_dir, timeout_s=200)
        assert dead not in nodes_of(cluster, job)
    finally:
        # Not sooner: a minute later Slurm sends once more what it could not tell the dead node, which is to end this job.
        cluster.node("start-node", dead)
    assert resumed_at >= OFTEN
    assert resumed_at % OFTEN == 0
    wait_for_step(run_dir, last_step(run_dir) + 1)
    while last_step(run_dir) < resumed_at + GOES_ON:
        time.sleep(0.2)
    said = status(cluster, run_dir)
    assert said.startswith("bereft  running"), said
    made = losses(run_dir)[: resumed_at + GOES_ON]
    assert made == unbroken.first(resumed_at + GOES_ON)
    cancelled_for_good(cluster, job, run_dir)


@contextlib.contextmanager
def drained(cluster: Cluster, node: str) -> Iterator[None]:
    """Within the block no job starts on that node; what runs there goes on."""
    cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        yield
    finally:
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    """The nodes that a running job has, the one that runs its script first."""
    shown = cluster.show(job)
    nodes, host = (re.search(rf"\b{key}=(\S+)", shown) for key in ("NodeList", "BatchHost"))
    assert nodes, shown
    assert host, shown
    names = cluster.run("scontrol", "show", "hostnames", nodes[1]).stdout.split()
    return sorted(names, key=lambda name: name != host[1])


def cancelled_for_good(cluster: Cluster, job: str, run_dir: Path) -> None:
    """`cancel` ends the job: the ranks save, but the script must not put it back into the queue."""
    cluster.moe_bench("cancel", str(run_dir))
    deadline = time.monotonic() + 90
    while "JobState=CANCELLED" not in cluster.show(job) or "EndTime=Unknown" in cluster.show(job):
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.2)
    time.sleep(3)  # past KillWait: nothing of the script is left that could requeue it
    assert cluster.state(job) == "CANCELLED"
    assert status(cluster, run_dir).startswith(f"{run_dir.name}  cancelled")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_submissions_of_one_name_go_on_from_one_another(
    cluster: Cluster, tmp_path: Path, unbroken: Unbroken
) -> None:
    chain = {"DEPENDENCY": "singleton", "RUN_NAME": "chained", "MAX_REQUEUES": "0"}
    first_job, first = submit_saving(cluster, tmp_path, "first", SELDOM, **chain)
    second_job, second = submit_saving(cluster, tmp_path, "second", SELDOM, **chain)
    wait_for_step(first, 3)
    assert "waits for another job to end" in status(cluster, second)
    cluster.run("scancel", "--batch", "--signal=USR1", first_job)
    cluster.wait_for(first_job, "COMPLETED")
    assert status(cluster, first).startswith("first  stopped")
    stopped_at = last_step(first)
    wait_for_step(second, stopped_at + GOES_ON)
    cluster.run("scancel", second_job)
    assert loaded_steps(second) == [stopped_at]
    assert steps(second)[0] == stopped_at + 1
    together = [*losses(first), *losses(second)][: stopped_at + GOES_ON]
    assert together == unbroken.first(stopped_at + GOES_ON)
