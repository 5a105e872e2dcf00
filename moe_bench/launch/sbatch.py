"""sbatch: hands a script to Slurm, and says what a refusal means."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from moe_bench.errors import LaunchError

SUBMIT_TIMEOUT_S = 60
QUEUE_FULL_PATIENCE_S = 12
"""How long sbatch may try again by itself while the cluster takes no more jobs: it is then amid one of its pauses."""
_QUEUE_FULL = "temporarily unable to accept job"


def submit(script: Path) -> str:
    """The id of the job, or of the array. Raises LaunchError with sbatch's words and what to do."""
    done = _sbatch(["--parsable", str(script)])
    if done.returncode != 0:
        raise LaunchError(_refusal(done, script))
    return done.stdout.strip().split(";")[0]


def _sbatch(options: list[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on PATH: this is not a Slurm login node; run on this machine with ./interactive_benchmarking.sh, "
            "or look at what would be submitted with DRY_RUN=1"
        )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")
    }
    command = ["sbatch", *options]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=environment)
        try:
            answer = _answer(process, said)
        finally:
            process.kill()
            process.wait()
        words = _written(said)
    return subprocess.CompletedProcess(command, process.returncode, answer.decode(), words)


def _answer(process: subprocess.Popen[bytes], said: IO[bytes]) -> bytes:
    try:
        return process.communicate(timeout=QUEUE_FULL_PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        if _QUEUE_FULL in _written(said):  # sbatch would go on trying for two minutes
            raise LaunchError(
                f"the cluster takes no more jobs (sbatch: {_written(said).strip()}); nothing was submitted: wait for a job "
                "to end (`squeue -u $USER`, `scontrol show config | grep MaxJobCount`) and submit again"
            ) from None
    try:
        return process.communicate(timeout=SUBMIT_TIMEOUT_S - QUEUE_FULL_PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch did not answer within {SUBMIT_TIMEOUT_S} s; the controller may be down (scontrol ping), and the job may or may not be queued: look with squeue"
        ) from None


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


_ADVICE = (
    (
        "unrecognized option '--segment",
        "this Slurm is older than 24.05 and knows no --segment; unset SEGMENT",
    ),
    (
        "unrecognized option '--container",
        "this Slurm has no pyxis; set CONTAINER_RUNTIME=apptainer, or none with a bare-metal Python",
    ),
    (
        "Invalid account",
        "the account is not one of yours: see `sacctmgr show assoc user=$USER`; set ACCOUNT",
    ),
    ("invalid partition", "see `sinfo -s` for the partitions; set PARTITION"),
    ("Invalid node name", "see `sinfo -N` for the nodes; set NODELIST or EXCLUDE"),
    ("Invalid feature", "see `sinfo -o '%N %f'` for the nodes' features; set CONSTRAINT"),
    ("reservation is invalid", "see `scontrol show reservation`; set or unset RESERVATION"),
    ("Invalid qos", "see `sacctmgr show assoc user=$USER format=qos`; set QOS"),
    ("time limit", "the partition or QOS allows less time: see `sinfo -o '%P %l'`; lower RUN_TIME"),
    (
        "node configuration is not available",
        "no node of the partition has what was asked; compare NNODES, GPUS_PER_NODE, GRES and MEM with `sinfo -N -l`",
    ),
    ("QOSMaxSubmitJobPerUserLimit", "the queue is full for you: wait for a job of yours to end"),
    (
        "Unable to contact slurm controller",
        "the controller is down or unreachable: `scontrol ping`",
    ),
)


def _refusal(done: subprocess.CompletedProcess[str], script: Path) -> str:
    said = (
        " ".join(line.strip() for line in done.stderr.strip().splitlines())
        or f"exit code {done.returncode}"
    )
    advice = next(
        (way_out for sign, way_out in _ADVICE if sign.lower() in said.lower()),
        "nothing was submitted",
    )
    return f"sbatch refused {script}: {said}; {advice}"
