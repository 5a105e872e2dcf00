"""What runs in every pod, run here: stops reach the ranks alone, and the pod's exit code says whether to start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.launch.kubernetes_objects import script
from moe_bench.results.writer import RunWriter
from tests.support.recorded import say

PATIENCE_S = 60.0
RANK = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    print("rank told to stop", flush=True)
    time.sleep(0.3)
    pathlib.Path(os.environ["MOE_BENCH_RUN_DIR"], "results", "steps-left").touch()
    print("last words", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("rank is up", flush=True)
time.sleep(60)
"""


def start(tmp_path: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
    mounted = tmp_path / "configmap"
    mounted.mkdir(exist_ok=True)
    (mounted / "run.json").write_text("{}")
    environment = {
        "PATH": os.environ["PATH"],
        "MOE_BENCH_RUN_DIR": str(tmp_path / "run"),
        "NODE_RANK": "1",
        "RANK": "5",
        **variables,
    }
    pod = script("pod.sh").replace("/etc/moe-bench", str(mounted))
    with (tmp_path / "pod.log").open("wb") as log:
        return subprocess.Popen(
            ["bash", "-c", pod, "moe_bench", *command], env=environment, stdout=log, stderr=log
        )


def ranks(tmp_path: Path) -> tuple[str, ...]:
    """What stands for torchrun: it starts one rank, and notes a signal that it should not have got."""
    trap = f"trap 'touch {tmp_path}/torchrun-was-told' TERM; "
    wait = (
        'bash -c "$0" moe_bench "$@" & rank=$!; wait $rank; rc=$?; wait $rank 2>/dev/null; exit $rc'
    )
    return ("bash", "-c", trap + wait, script("rank.sh"), sys.executable, "-c", RANK)


def wait_for(path: Path, words: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < deadline_s, path.read_text() if path.exists() else path
        time.sleep(0.05)


def test_the_runs_directory_is_laid_out_once(tmp_path: Path) -> None:
    assert start(tmp_path, "true").wait(PATIENCE_S) == 0
    record = tmp_path / "run" / "run.json"
    assert record.read_text() == "{}"
    assert (tmp_path / "run" / "logs").is_dir()
    record.write_text("what was there before")
    assert start(tmp_path, "true").wait(PATIENCE_S) == 0
    assert record.read_text() == "what was there before"


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_exit_status_is_the_ranks(tmp_path: Path, status: int) -> None:
    assert start(tmp_path, "bash", "-c", f"exit {status}").wait(PATIENCE_S) == status


def test_a_stop_reaches_the_ranks_alone_and_the_pod_asks_to_go_on(tmp_path: Path) -> None:
    pod = start(tmp_path, *ranks(tmp_path))
    said = tmp_path / "run" / "logs" / "rank-5.log"
    wait_for(said, "rank is up")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(PATIENCE_S) == 75, (tmp_path / "pod.log").read_text()
    wait_for(said, "last words")
    log = (tmp_path / "pod.log").read_text()
    assert "pod 1 is told to stop" in log
    assert "stopped with steps left: exit 75" in log
    assert not (tmp_path / "torchrun-was-told").exists()


def test_a_stop_before_any_rank_is_up_ends_the_pod(tmp_path: Path) -> None:
    pod = start(tmp_path, "bash", "-c", "echo up; exec sleep 60")
    wait_for(tmp_path / "pod.log", "up")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_a_stop_while_the_ranks_are_being_started_ends_the_pod(tmp_path: Path) -> None:
    early = tmp_path / "early.sh"
    early.write_text("""trap '[[ "$BASH_COMMAND" != "torchrun=\\$!" ]] || kill -TERM $$' DEBUG""")
    pod = start(tmp_path, "sleep", "90", BASH_ENV=str(early))
    assert pod.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert "pod 1 is told to stop" in (tmp_path / "pod.log").read_text()


def test_a_pod_of_a_run_that_is_over_has_nothing_to_do(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run")
    say(writer, "end", 8, outcome="stopped", step=3)
    assert start(tmp_path, "false").wait(PATIENCE_S) == 1
    say(writer, "end", 60, outcome="completed", step=40)
    writer.close()
    assert start(tmp_path, "false").wait(PATIENCE_S) == 0
    assert "the run is complete already" in (tmp_path / "pod.log").read_text()


def test_steps_left_by_an_earlier_start_do_not_hide_a_failure(tmp_path: Path) -> None:
    results = tmp_path / "run" / "results"
    results.mkdir(parents=True)
    (results / "steps-left").touch()
    assert start(tmp_path, "false").wait(PATIENCE_S) == 1
