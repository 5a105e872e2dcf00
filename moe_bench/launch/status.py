"""What became of runs: Slurm's word where it has one, the run's own files always."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import LaunchError, RecordError
from moe_bench.launch import queue
from moe_bench.launch.job import submissions
from moe_bench.launch.queue import QueueEntry
from moe_bench.results.manifest import read_manifest
from moe_bench.results.state import Standing, State, standing
from moe_bench.results.triage import Diagnosis, diagnose, last_error_line

TAIL_BYTES = 64 * 1024
"""Of each log that is read for an error."""
_RANK_LOG = re.compile(r"rank-(\d+)\.log\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Everything `status` shows of one run."""

    run_id: str
    model: str
    state: str
    """A `State` of the files, or Slurm's (lower case) where Slurm knows more."""
    job_id: str | None = None
    why: str | None = None
    """Why it waits or ended, in plain words."""
    step: int | None = None
    train_steps: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    """None unless it is training."""
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The first rank that failed and what its words mean."""

    rank: int | None
    """None when only the job's own log tells."""
    line: str
    diagnosis: Diagnosis | None


def statuses(run_dirs: Iterable[Path]) -> tuple[list[RunStatus], str | None]:
    """One status a run, in the order given, and what Slurm said when it did not answer (files alone are used then)."""
    runs = list(run_dirs)
    jobs = {run_dir: _slurm_job(run_dir) for run_dir in runs}
    trouble = None
    entries: Mapping[str, QueueEntry] = {}
    try:
        entries = queue.query(job for job in jobs.values() if job is not None)
    except LaunchError as error:
        trouble = str(error)
    return [_status(run_dir, jobs[run_dir], entries) for run_dir in runs], trouble


def _slurm_job(run_dir: Path) -> str | None:
    submitted = submissions(run_dir)
    return submitted[-1].job_id if submitted and submitted[-1].launcher == "slurm" else None


def _status(run_dir: Path, job_id: str | None, entries: Mapping[str, QueueEntry]) -> RunStatus:
    entry = entries.get(job_id) if job_id else None
    try:
        manifest, now = read_manifest(run_dir), standing(run_dir)
    except RecordError as error:
        return RunStatus(
            run_id=run_dir.name, model="?", state="unreadable", job_id=job_id, why=str(error)
        )
    state, why = _state(now, entry)
    last = now.last_steps[-1] if now.last_steps else None
    training = last is not None and state in {State.RUNNING, "running"}
    step_time_s = (
        statistics.median(s.step_time_s for s in now.last_steps) if now.last_steps else None
    )
    return RunStatus(
        run_id=manifest.run_id,
        model=manifest.model,
        state=state,
        job_id=job_id,
        why=why,
        step=last.step if last else None,
        train_steps=last.train_steps if last else None,
        tokens_per_s=statistics.median(s.tokens_per_s for s in now.last_steps) if last else None,
        eta_s=(last.train_steps - last.step) * step_time_s
        if training and last and step_time_s
        else None,
        failure=find_failure(run_dir / "logs") if _went_wrong(state) else None,
    )


def _state(now: Standing, entry: QueueEntry | None) -> tuple[str, str | None]:
    """Slurm knows of waiting and of ends from outside; the files know what training did."""
    if entry is None:
        why = f"nothing written for {now.silent_s:.0f} s" if now.state is State.SILENT else None
        return now.state, why
    if entry.state == "PENDING":
        return "pending", entry.explanation
    if not entry.ended and now.state is State.NOT_STARTED:
        return "starting", f"on {entry.nodes}, nothing written yet"
    if entry.ended and now.state is not State.COMPLETED:
        return entry.state.lower().replace(
            "_", " "
        ), None if entry.reason == "None" else entry.explanation
    return now.state, None


def _went_wrong(state: str) -> bool:
    fine = {
        State.COMPLETED,
        State.RUNNING,
        State.NOT_STARTED,
        State.STOPPED,
        "pending",
        "starting",
        "running",
        "completed",
    }
    return state not in fine


def find_failure(logs: Path) -> Failure | None:
    """The earliest log that ends in an error, by its last write; None when no log holds one."""
    found: list[tuple[float, Failure]] = []
    for path in logs.glob("*.log"):
        lines = _tail(path)
        line = last_error_line(lines)
        if line is None:
            continue
        match = _RANK_LOG.search(path.name)
        failure = Failure(
            rank=int(match[1]) if match else None, line=line, diagnosis=diagnose(lines)
        )
        found.append((path.stat().st_mtime, failure))
    if not found:
        return None
    of_ranks = [one for one in found if one[1].rank is not None]
    return min(of_ranks or found, key=lambda one: (one[0], one[1].rank or 0))[1]


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
