"""What was submitted for a run: `job.json` in its directory, one entry a submission, the newest last."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError
from moe_bench.launch.launcher import JobHandle, LaunchPlan

JOB_FILE = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One submission of a run."""

    launcher: str
    job_id: str | None
    """None when the scheduler refused it."""
    script: str
    """File name within the run directory."""
    script_sha256: str
    submitted_unix_s: float
    refused: str | None = None
    """What the scheduler said when it took no job; None when it took one."""
    cancelled: bool = False
    """True once `cancel` was called for it."""


def record_submission(
    run_dir: Path, plan: LaunchPlan, handle: JobHandle, *, launcher: str | None = None
) -> Submission:
    """Add the job that was taken to `job.json`, atomically.

    `launcher`: the name under which the registry finds it again, where that is not the plan's own.
    """
    return _add(run_dir, plan, job_id=handle.job_id, launcher=launcher)


def record_refusal(run_dir: Path, plan: LaunchPlan, said: str) -> Submission:
    """Add that no job was taken, and why, to `job.json`, atomically."""
    return _add(run_dir, plan, refused=said)


def record_cancellation(run_dir: Path) -> None:
    """Mark the newest submission, which must exist, as cancelled."""
    *earlier, last = submissions(run_dir)
    _write(run_dir, [*earlier, replace(last, cancelled=True)])


def _add(
    run_dir: Path,
    plan: LaunchPlan,
    *,
    job_id: str | None = None,
    refused: str | None = None,
    launcher: str | None = None,
) -> Submission:
    submission = Submission(
        launcher=launcher or plan.launcher,
        job_id=job_id,
        script=plan.filename,
        script_sha256=plan.sha256,
        submitted_unix_s=time.time(),
        refused=refused,
    )
    _write(run_dir, [*submissions(run_dir), submission])
    return submission


def _write(run_dir: Path, entries: list[Submission]) -> None:
    encoded = msgspec.json.encode(entries)
    path = run_dir / JOB_FILE
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(msgspec.json.format(encoded, indent=2))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def submissions(run_dir: Path) -> list[Submission]:
    """All of them, oldest first; none when the run was never submitted. Raises RecordError for a damaged file."""
    path = run_dir / JOB_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Submission])
    except FileNotFoundError:
        return []
    except msgspec.MsgspecError as error:
        raise RecordError(
            f"{path}: not a list of submissions ({error}); restore or delete it"
        ) from error
