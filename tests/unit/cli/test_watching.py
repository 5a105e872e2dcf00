"""What a user is shown of a failed run's log; a watched run that is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.cli._watching import telling_lines
from tests.support.projects import REPOSITORY

CHAINED = """loading
>> '--exit-on-missing-checkpoint' set ... exiting. <<

Traceback (most recent call last):
  File "checkpointing.py", line 1697
SystemExit

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "pretrain.py", line 171
MoeBenchError: what it said last, above, tells why
"""


def test_what_was_said_before_the_first_of_chained_tracebacks_is_shown_with_the_last_one() -> None:
    assert telling_lines(CHAINED.splitlines()) == [
        "loading",
        ">> '--exit-on-missing-checkpoint' set ... exiting. <<",
        "Traceback (most recent call last):",
        '  File "pretrain.py", line 171',
        "MoeBenchError: what it said last, above, tells why",
    ]


def test_without_a_traceback_the_last_lines_are_shown() -> None:
    assert telling_lines(f"line {i}" for i in range(40)) == [f"line {i}" for i in range(25, 40)]


def test_what_python_ignored_afterwards_does_not_hide_the_failure() -> None:
    failure = ["Traceback (most recent call last):", '  File "a.py"', "ValueError: empty"]
    ignored = ["Exception ignored in: <function __del__>", *failure[:2], "AttributeError: gone"]
    assert telling_lines([*failure, *ignored, *ignored]) == failure
    assert telling_lines([*failure, *ignored, "rank 0 ends"]) == [*failure, "rank 0 ends"]


WATCHING = """
import os, signal, sys, time
from pathlib import Path
from moe_bench.cli._watching import watch
from moe_bench.launch import directory, local
from moe_bench.launch.launcher import LaunchPlan
from tests.support.runs import make_run
class Interrupted(local.subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if command[0] != "bash": return
        deadline_s = time.monotonic() + 60
        while not (run.run_dir / "launch.sh.ready").exists() and time.monotonic() < deadline_s: time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
script = 'trap "echo told > $0.told; exit 143" TERM; echo > $0.ready; while :; do sleep 0.05; done'
run, plan = make_run(Path(sys.argv[1]), PROFILE="0"), LaunchPlan(launcher="local", filename="launch.sh", script=script)
directory.create(run, plan)
if "early" in sys.argv: local.subprocess.Popen = Interrupted
sys.exit(watch(plan, run))
"""
"""Watches a script that stands in for a run's own; `early`: told to stop before it has its process."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_command_is_passed_on_to_the_runs_script(
    number: signal.Signals, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = watching(run_dir)
    deadline_s = time.monotonic() + 60
    while not (run_dir / "launch.sh.ready").exists() and process.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert_told(run_dir, said)


def test_a_signal_that_comes_while_the_script_is_started_is_passed_on_too(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = watching(run_dir, "early")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert_told(run_dir, said)


def watching(run_dir: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WATCHING, str(run_dir), *words],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_told(run_dir: Path, said: str) -> None:
    assert "interrupted: after this step the ranks end" in said
    assert (run_dir / "launch.sh.told").exists()
    assert '"outcome":"interrupted"' in (run_dir / "results/events-launcher.jsonl").read_text()
