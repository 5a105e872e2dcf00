"""Where runs stand, from their files and from what a scheduler says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_bench.launch.job import record_cancellation, record_refusal, record_submission
from moe_bench.launch.launcher import JobHandle, LaunchPlan
from moe_bench.launch.status import RunStatus, find_failure, statuses
from moe_bench.results.triage import read_rules
from moe_bench.results.writer import RunWriter
from tests.support.recorded import say, write_manifest, write_run
from tests.unit.launch.test_queue import tools

PLAN = LaunchPlan(launcher="slurm", filename="launch.sh", script="#!/bin/bash\n")


def submitted(run_dir: Path, *log: str) -> Path:
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    if not (run_dir / "run.json").exists():
        write_manifest(run_dir)
    record_submission(run_dir, PLAN, JobHandle(launcher="slurm", job_id="7"))
    if log:
        (run_dir / "logs" / "slurm-7.log").write_text("\n".join(log))
    return run_dir


def status(run_dir: Path, monkeypatch: pytest.MonkeyPatch, entry: str | None = None) -> RunStatus:
    """`entry`: the job's line of squeue; None where Slurm knows the job no more."""
    forgot = "echo 'Invalid job id specified' >&2; exit 1"
    off = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
    (run_dir.parent / "tools").mkdir(exist_ok=True)
    squeue = forgot if entry is None else f"echo '{entry}'"
    tools(run_dir.parent / "tools", monkeypatch, squeue=squeue, sacct=off)
    [found], trouble = statuses([run_dir], read_rules())
    assert trouble is None
    return found


def test_a_refused_submission_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path / "run")
    record_refusal(tmp_path / "run", PLAN, "invalid partition")
    found = status(tmp_path / "run", monkeypatch)
    assert (found.state, found.why, found.job_id) == ("refused", "invalid partition", None)


def test_a_cancelled_job_that_the_queue_forgot_is_still_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(tmp_path / "run")
    assert status(run_dir, monkeypatch).state == "not started"
    record_cancellation(run_dir)
    assert status(run_dir, monkeypatch).state == "cancelled"


@pytest.mark.parametrize(
    ("line", "state", "diagnosis"),
    [
        ("*** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 DUE TO TIME LIMIT ***", "timeout", "time limit"),
        (
            "*** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
            "node fail",
            "a node failed",
        ),
        (
            "*** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 DUE TO PREEMPTION ***",
            "preempted",
            "preempted",
        ),
    ],
)  # fmt: skip
def test_an_end_from_outside_is_told_from_the_jobs_log_alone(
    line: str, state: str, diagnosis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", num_steps=3, finished=False)
    run_dir = submitted(tmp_path / "run", "moe_bench: job 7, restart 0, nodes n1", line)
    # What the surviving rank says is only what followed.
    (run_dir / "logs" / "rank-0.log").write_text("RuntimeError: Connection closed by peer\n")
    found = status(run_dir, monkeypatch)
    assert found.state == state
    assert found.failure is not None
    assert found.failure.diagnosis is not None
    assert found.failure.diagnosis.name == diagnosis


def test_slurms_word_on_a_lost_node_outranks_what_the_other_ranks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", num_steps=3, finished=False)
    run_dir = submitted(tmp_path / "run")
    (run_dir / "logs" / "rank-0.log").write_text("RuntimeError: Connection closed by peer\n")
    found = status(run_dir, monkeypatch, "7|NODE_FAIL|NodeDown|1:00|20:00|n[1-2]")
    assert found.state == "node fail"
    assert found.failure is not None
    assert found.failure.diagnosis is not None
    assert found.failure.diagnosis.name == "a node failed"
    assert "EXCLUDE" in found.failure.diagnosis.what_to_do


def test_a_requeued_job_says_why_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", num_steps=3, finished=False)
    lost = "moe_bench: node failure: n2 does not answer: requeueing job 7"
    run_dir = submitted(tmp_path / "run", "moe_bench: job 7, restart 0, nodes n[1-2]", lost)
    found = status(run_dir, monkeypatch, "7|PENDING|BeginTime|0:00|20:00|")
    assert found.state == "pending"
    assert found.why is not None
    assert "begin time" in found.why
    assert "n2 does not answer" in found.why


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        ("7|PENDING|BeginTime|0:00|20:00|", "pending"),
        ("7|NODE_FAIL|NodeDown|1:00|20:00|n[1-2]", "node fail"),
    ],
)
def test_the_loss_of_the_scripts_own_node_is_told_from_its_silence(
    entry: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's words on the end would have reached the log through that node."""
    write_run(tmp_path / "run", num_steps=3, finished=False)
    begun = "moe_bench: job 7, restart 1, nodes n[1-2], rendezvous n1:20007"
    run_dir = submitted(tmp_path / "run", "moe_bench: srun ended with 1", begun)
    found = status(run_dir, monkeypatch, entry)
    assert found.state == state
    assert found.why is not None
    assert found.why.endswith("Node failure on n1, which ran the job's script")
    assert status(run_dir, monkeypatch, "7|RUNNING|None|1:00|20:00|n[1-2]").why is None


def test_a_script_that_ended_by_itself_was_on_no_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", num_steps=3, finished=False)
    begun = "moe_bench: job 7, restart 0, nodes n[1-2], rendezvous n1:20007"
    run_dir = submitted(tmp_path / "run", begun, "moe_bench: srun ended with 0")
    found = status(run_dir, monkeypatch, "7|PENDING|BeginTime|0:00|20:00|")
    assert found.why is not None
    assert "before that" not in found.why


def test_a_restarted_job_is_starting_until_its_ranks_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    write_run(run_dir, num_steps=3, finished=False)
    from moe_bench.results.writer import RunWriter

    writer = RunWriter(run_dir)
    say(writer, "end", 60, outcome="stopped", step=3)
    writer.close()
    submitted(run_dir, "moe_bench: job 7, restart 1, nodes n1")
    found = status(run_dir, monkeypatch, "7|RUNNING|None|0:05|20:00|n1")
    assert found.state == "starting"


KILLED = "srun: error: n2: task 1: Killed"
EXITED = "srun: error: n2: tasks 1-3: Exited with exit code 1"


@pytest.mark.parametrize(
    ("said", "line", "diagnosis"),
    [(KILLED, KILLED, "killed"), (EXITED, "RuntimeError: CUDA out of memory", "out of GPU memory")],
)
def test_the_rank_that_srun_saw_end_first_is_the_one_that_failed(
    said: str, line: str, diagnosis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", num_steps=3, finished=False)
    after = "srun: error: n1: task 0: Exited with exit code 1"
    begun = "moe_bench: job 7, restart 0, nodes n[1-2]"
    run_dir = submitted(tmp_path / "run", begun, said, after, "moe_bench: srun ended with 137")
    step = "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T08:32:00 ***"
    (run_dir / "logs" / "rank-0.log").write_text(f"Connection reset by peer: error\n{step}\n")
    (run_dir / "logs" / "rank-1.log").write_text(f"RuntimeError: CUDA out of memory\n{step}\n")
    found = status(run_dir, monkeypatch, "7|FAILED|NonZeroExitCode|1:00|20:00|n[1-2]")
    assert found.failure is not None
    assert (found.failure.rank, found.failure.line) == (1, line)
    assert found.failure.diagnosis is not None
    assert found.failure.diagnosis.name == diagnosis


def test_words_that_only_another_rank_said_tell_the_first_ranks_failure(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-1.log").write_text("MoeBenchError: it ended the run; what it said tells why")
    (logs / "rank-0.log").write_text(">> '--exit-on-missing-checkpoint' set ... exiting. <<\nError")
    os.utime(logs / "rank-1.log", (1, 1))
    failure = find_failure(tmp_path, read_rules())
    assert failure is not None
    assert (failure.rank, failure.short) == (1, "there is no checkpoint")
    say(RunWriter(tmp_path, source="launcher"), "error", 5, failed_rank=0, message="rank 0 failed")
    failure = find_failure(tmp_path, read_rules())
    assert failure is not None
    assert failure.rank == 0  # the record knows better than the times of the files
