"""What Slurm says of a job: squeue while it knows it, then sacct, each call with a time limit of its own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.errors import LaunchError

QUERY_TIMEOUT_S = 10
_FIELDS = "%i|%T|%r|%M|%l|%N"

ENDED = frozenset(
    {
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
        *("PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    }
)

WHY_PENDING = {
    "Priority": "other jobs go first",
    "Resources": "not enough free nodes yet",
    "None": "just submitted: the scheduler has not looked at it yet",
    "Dependency": "waits for another job to end",
    "DependencyNeverSatisfied": "the job it waits for failed, so it will never start: cancel it",
    "BeginTime": "requeued; it starts when its begin time has come (up to two minutes)",
    "JobHeldUser": "held by its owner: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator: ask them",
    "PartitionConfig": "the partition's limits do not allow it: compare NNODES, RUN_TIME and ACCOUNT with `scontrol show partition`",
    "PartitionNodeLimit": "asks for more nodes than the partition allows: lower NNODES",
    "PartitionTimeLimit": "asks for more time than the partition allows: lower RUN_TIME",
    "PartitionDown": "the partition takes no jobs now: choose another PARTITION, or wait",
    "PartitionInactive": "the partition runs no jobs now: choose another PARTITION, or wait",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions": (
        "the nodes it needs are down, drained or reserved: see `sinfo -R`"
    ),
    "JobArrayTaskLimit": "the array runs as many tasks at once as it was told to",
    "Licenses": "a licence it needs is in use",
    "Reservation": "its reservation has not begun",
    "NodeDown": "a node it was given is down",
    "launch failed requeued held": (
        "it could not be started on its nodes and is held: see the node's slurmd, then scontrol release JOB"
    ),
    "JobHoldMaxRequeue": "requeued too often and held: find the cause, then scontrol release JOB",
    "QOSMaxSubmitJobPerUserLimit": "you have as many jobs in the queue as the QOS allows",
    "QOSMaxNodePerUserLimit": "you use as many nodes as the QOS allows",
    "QOSMaxWallDurationPerJobLimit": "asks for more time than the QOS allows: lower RUN_TIME",
    "QOSGrpNodeLimit": "the QOS's node limit is reached",
    "AssocMaxJobsLimit": "the account runs as many jobs as it may",
    "AccountNotAllowed": "the partition does not take this account: set ACCOUNT or PARTITION",
    "BadConstraints": "no node has what CONSTRAINT asks for",
    "QOSMaxJobsPerUserLimit": "you have as many running jobs as the QOS allows",
    "AssocGrpNodeLimit": "the account's node limit is reached",
    "InvalidAccount": "the account may not run here: set ACCOUNT",
}
"""Slurm's pending reasons in plain words (squeue's man page, JOB REASON CODES)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueEntry:
    """One job as Slurm sees it."""

    job_id: str
    state: str
    """First word of Slurm's state: PENDING, RUNNING, COMPLETED, TIMEOUT, ..."""
    reason: str
    """Slurm's reason code; "None" when there is none."""
    elapsed: str
    time_limit: str
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether the job is over for good (a requeued job is pending)."""
        return self.state in ENDED

    @property
    def explanation(self) -> str:
        """Why it is pending, in plain words; the code itself where none are known."""
        whole = self.reason.strip("()")
        code = whole.split(",")[0].split(":")[0]
        return WHY_PENDING.get(whole) or WHY_PENDING.get(code, self.reason)


def query(job_ids: Iterable[str]) -> dict[str, QueueEntry]:
    """Those of the jobs that Slurm still knows. Raises LaunchError when Slurm is there but does not answer."""
    wanted = sorted(set(job_ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    found = _squeue(wanted)
    missing = [job_id for job_id in wanted if job_id not in found]
    return found | (_sacct(missing) if missing else {})


def cancel(job_id: str) -> None:
    """`scancel`. Raises LaunchError with its words."""
    done = _call(["scancel", job_id])
    if done.returncode != 0:
        raise LaunchError(f"scancel {job_id} failed: {done.stderr.strip()}")


def _squeue(job_ids: list[str]) -> dict[str, QueueEntry]:
    # One unknown id alone makes squeue fail; beside a known one it is left out. Both mean: Slurm forgot it.
    done = _call(
        [  # --array: a line for each task
            *("squeue", "--array", "--states=all", "--noheader"),
            *("--format", _FIELDS, "--jobs", ",".join(job_ids)),
        ]
    )
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:
            return {}
        raise LaunchError(
            f"squeue failed: {done.stderr.strip()}; is the controller up? (scontrol ping)"
        )
    return _entries(done.stdout)


def _sacct(job_ids: list[str]) -> dict[str, QueueEntry]:
    if shutil.which("sacct") is None:
        return {}
    fields = "JobID,State,Reason,Elapsed,Timelimit,NodeList"
    done = _call(["sacct", "-X", "-n", "-P", f"--format={fields}", "-j", ",".join(job_ids)])
    # Accounting is often switched off: the run's own files then have the last word.
    return _entries(done.stdout) if done.returncode == 0 else {}


def _entries(text: str) -> dict[str, QueueEntry]:
    entries = {}
    for line in text.splitlines():
        parts = line.split("|")
        if len(parts) != 6:
            continue
        job_id, state, reason, elapsed, limit, nodes = parts
        entries[job_id] = QueueEntry(
            job_id=job_id,
            state=state.split()[0] if state else "UNKNOWN",
            reason=reason or "None",
            elapsed=elapsed,
            time_limit=limit,
            nodes=nodes,
        )
    return entries


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not on PATH: this is not a Slurm node") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]} did not answer within {QUERY_TIMEOUT_S} s; is the controller up? (scontrol ping)"
        ) from None
