"""What a job's own log says of its end; the lines are those that Slurm 22.05 and our script wrote."""

from __future__ import annotations

import pytest

from moe_bench.launch.job_log import read

START = "moe_bench: job 7, restart 0, nodes n[1-2], rendezvous n1:20007"
AGAIN = "moe_bench: job 7, restart 1, nodes n[1-2], rendezvous n1:20007"
LIMIT = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 DUE TO TIME LIMIT ***"
NODE = (
    "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 DUE TO NODE FAILURE, "
    "SEE SLURMCTLD LOG FOR DETAILS ***"
)
CANCEL = "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T07:30:42 ***"
STEP = "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T07:30:42 ***"
LOST = "moe_bench: node failure: n2 does not answer: requeueing job 7"


@pytest.mark.parametrize(
    ("lines", "ending", "from_outside"),
    [
        ([START], None, False),
        ([START, LIMIT], "timeout", True),
        ([START, NODE], "node fail", True),
        ([START, "srun: error: Node failure on n2", NODE], "node fail", True),
        ([START, CANCEL], "cancelled", True),
        ([START, STEP, "moe_bench: srun ended with 137"], "failed", False),
        ([START, "moe_bench: srun ended with 0"], None, False),
        ([START, "moe_bench: srun ended with 1", LOST], "requeued", True),
        ([START, "moe_bench: srun ended with 1", LOST, CANCEL], "cancelled", True),
        ([START, "moe_bench: stopped with steps left: requeueing job 7"], "requeued", False),
        (
            [START, "moe_bench: stopped with steps left; not requeued: 10 restarts are spent"],
            "stopped",
            False,
        ),
        ([START, NODE, AGAIN], None, False),
        ([START, NODE, AGAIN, "moe_bench: srun ended with 2"], "failed", False),
    ],
)
def test_the_newest_attempts_last_word_counts(
    lines: list[str], ending: str | None, from_outside: bool
) -> None:
    found = read(lines)
    assert (found.ending, found.from_outside) == (ending, from_outside)
