"""What was submitted for a run: `job.json` in its directory, one entry a submission, the newest last."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError
from moe_bench.launch.launcher import JobHandle, LaunchPlan

JOB_FILE = "job.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One submission of a run."""

    launcher: str
    job_id: str
    script: str
    """File name within the run directory."""
    script_sha256: str
    submitted_unix_s: float


def record_submission(run_dir: Path, plan: LaunchPlan, handle: JobHandle) -> Submission:
    """Add to `job.json`, atomically."""
    submission = Submission(
        launcher=handle.launcher,
        job_id=handle.job_id,
        script=plan.filename,
        script_sha256=plan.sha256,
        submitted_unix_s=time.time(),
    )
    encoded = msgspec.json.encode([*submissions(run_dir), submission])
    path = run_dir / JOB_FILE
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(msgspec.json.format(encoded, indent=2))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return submission


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
