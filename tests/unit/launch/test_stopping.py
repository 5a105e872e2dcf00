"""The script of a run on this machine, started by hand: what each signal does to its ranks, for which a shell stands in."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY

PATIENCE_S = 60.0
SUPERVISOR = REPOSITORY / "moe_bench" / "launch" / "templates" / "local.sh"
STUBBORN = 'trap ": > \\"$0/termed\\"" TERM; trap "" INT; echo $$ > "$0/ready"; while :; do sleep 0.05; done'
OBEDIENT = 'trap "exit 143" TERM; echo $$ > "$0/ready"; while :; do sleep 0.05; done'
TRAINING = 'echo $$ > "$0/ready"; until [[ -e "$0/results/stop" ]]; do sleep 0.05; done; exit "$1"'
"""Each is told its folder; the last trains until it is asked to stop, saves, and ends as it is told."""


def until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the script as a terminal would, its ranks being `body`, and waits until they are there."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str, *words: str, steps: str = "") -> subprocess.Popen[str]:
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "steps.jsonl").write_text(steps)
        process = subprocess.Popen(
            ["bash", str(SUPERVISOR), "bash", "-c", body, str(tmp_path), *words],
            env={"PATH": os.environ["PATH"], "MOE_BENCH_RUN_DIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        until(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text() != "")
        return process

    yield begin
    for process in started:
        process.kill()
        with contextlib.suppress(ProcessLookupError):  # the ranks, were they left
            os.killpg(int((tmp_path / "ready").read_text()), signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("status", "said"), [("0", None), ("3", 3)])
def test_ranks_that_train_are_asked_and_left_to_save(
    start: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
    status: str,
    said: int | None,
) -> None:
    process = start(TRAINING, status, steps="{}\n")
    os.killpg(process.pid, number)  # as a terminal does: to all of the foreground
    assert process.wait(timeout=PATIENCE_S) == (said or 128 + number)
    assert process.stderr is not None
    assert "after this step the ranks save" in process.stderr.read()


def test_before_the_first_step_the_ranks_end_at_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(OBEDIENT)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=PATIENCE_S) == 143
    assert not (tmp_path / "results" / "stop").exists()


def test_ranks_that_neither_save_nor_end_are_killed_by_the_third_signal(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start(STUBBORN, steps="{}\n")
    os.kill(process.pid, signal.SIGINT)
    until((tmp_path / "results" / "stop").exists)
    os.kill(process.pid, signal.SIGTERM)
    until((tmp_path / "termed").exists)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=PATIENCE_S) == 128 + signal.SIGKILL


def test_a_signal_before_the_script_knows_its_ranks_ends_them_too(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    early = tmp_path / "early.sh"
    early.write_text("""trap '[[ "$BASH_COMMAND" != "ranks=\\$!" ]] || kill -TERM $$' DEBUG""")
    done = subprocess.run(
        ["bash", str(SUPERVISOR), "sleep", "90"],
        env={
            "PATH": os.environ["PATH"],
            "MOE_BENCH_RUN_DIR": str(tmp_path),
            "BASH_ENV": str(early),
        },
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("status", [0, 1, 7])
def test_ranks_that_end_by_themselves_give_their_status_and_an_old_stop_is_forgotten(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, status: int
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "stop").touch()
    body = 'echo $$ > "$0/ready"; [[ ! -e "$0/results/stop" ]] || exit 9; exit "$1"'
    assert start(body, str(status)).wait(timeout=PATIENCE_S) == status
