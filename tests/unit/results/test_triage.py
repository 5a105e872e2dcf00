"""Failures are named by their own words."""

from __future__ import annotations

import pytest

from moe_bench.results.triage import diagnose, last_error_line

SAID = {
    "out of GPU memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
    "NCCL timeout": "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)",
    "a module is missing": "ModuleNotFoundError: No module named 'transformer_engine'",
    "a path is wrong": "FileNotFoundError: [Errno 2] No such file or directory: '/data/x.idx'",
    "time limit": "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-21T05:00:00 DUE TO TIME LIMIT ***",
    "a node failed": "slurmstepd: error: *** JOB 5 CANCELLED DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***",
    "preempted": "slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED DUE TO PREEMPTION ***",
    "the disk is full": "OSError: [Errno 28] No space left on device",
    "out of host memory": "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.0",
    "killed": "srun: error: n1: task 3: Killed",
}


@pytest.mark.parametrize(("name", "line"), SAID.items(), ids=list(SAID))
def test_failure_is_named_with_what_to_do(name: str, line: str) -> None:
    found = diagnose(["step 1 fine", line, "other ranks end"])
    assert found is not None
    assert found.name == name
    assert found.line == line
    assert found.what_to_do


def test_the_cause_wins_over_what_it_led_to() -> None:
    found = diagnose([SAID["killed"], SAID["out of GPU memory"]])
    assert found is not None
    assert found.name == "out of GPU memory"


def test_a_clean_log_has_no_diagnosis() -> None:
    assert diagnose(["iteration 1/10 | lm loss: 5.1", "done"]) is None


def test_last_error_line_is_the_last_one() -> None:
    assert (
        last_error_line(["RuntimeError: a", "ok", "ValueError: exception b", "bye"])
        == "ValueError: exception b"
    )
