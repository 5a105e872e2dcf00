"""`python -m moe_bench sweep` as a user runs it: interrupted, gone on with, read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from moe_bench.cli import report, summarize
from moe_bench.results.reader import read_steps
from moe_bench.results.sweep_record import COMPLETED, INTERRUPTED, read_sweep
from tests.support.projects import REPOSITORY

STEPS = 10
FLAGS = ["--mock-data", "--eval-iters", "0", "--train-iters", str(STEPS), "--lr-warmup-iters", "1"]
SWEEP = [sys.executable, "-m", "moe_bench", "sweep"]
COMMAND = [*SWEEP, "Tiny-Qwen3", "--vary", "MBS=4,3,8", *FLAGS]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given |= {"OUTPUT_PATH": str(tmp_path / "runs dir"), "PYTHONPATH": str(REPOSITORY)}
    given |= {"MOE_BENCH_DEVICE": "cpu", "SEQ_LEN": "32", "EP": "1", "GPUS_PER_NODE": "1"}
    given["OMP_NUM_THREADS"] = "1"  # a busy machine makes two threads wait for one another
    return given | more


def run(tmp_path: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(tmp_path, **more),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=300,
    )


def interrupted_in_its_second_point(tmp_path: Path) -> str:
    """Ctrl-C once the second point has started; what the sweep said."""
    process = subprocess.Popen(
        COMMAND,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if len(said) > 1 and said[-2].startswith("[2/2] point 2"):  # its ranks have begun to speak
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.stdout.readlines()
    assert process.wait(timeout=240) == 130, "".join(said)
    return "".join(said)


def test_a_sweep_is_interrupted_goes_on_and_is_read(tmp_path: Path) -> None:
    dry = run(tmp_path, *COMMAND, DRY_RUN="1")
    assert not (tmp_path / "runs dir").exists(), "a dry run wrote something"
    said = interrupted_in_its_second_point(tmp_path)
    assert "3 points (MBS 4 3 8)" in said
    assert "MBS=3: GBS=8 (runtime_configs/benchmarking/runtime.conf" in said
    [folder] = (tmp_path / "runs dir" / "sweeps").iterdir()
    assert f"go on with:\n  python -m moe_bench sweep --resume {folder.name}\n" in said
    assert [point.outcome for point in read_sweep(folder).points] == [COMPLETED, INTERRUPTED]
    left = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert left.stdout == "", "ranks outlived the sweep"

    again = run(tmp_path, *COMMAND)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on: 1 of 2 points are done, 1 left" in again.stdout
    sweep = read_sweep(folder)
    assert [len(point.attempts) for point in sweep.points] == [1, 2]
    for point in sweep.points:
        assert [step.step for step in read_steps(folder / point.name).records][-1] == STEPS
        assert (folder / point.name / "launch.sh").read_text() in dry.stdout
    assert "winner: point" in again.stdout

    base = ["--output-path", str(tmp_path / "runs dir")]
    shown = CliRunner().invoke(summarize.command, [folder.name, *base])
    assert shown.exit_code == 0, shown.output
    assert "cannot run: MBS=3" in shown.output
    page = CliRunner().invoke(report.command, [folder.name, *base])
    assert page.exit_code == 0, page.output
    assert "Speed over MBS" in (folder / "report.html").read_text()

    other = run(tmp_path, *COMMAND, "--id", folder.name, "--lr", "1e-2")
    assert other.returncode == 2
    assert "is a sweep of other arguments: flags" in other.stderr
    assert "--lr 1e-2 now" in other.stderr


def test_bad_sweeps_are_refused_with_exit_code_2_and_without_a_traceback(tmp_path: Path) -> None:
    cases = {
        ("Tiny-Qwen3", "--vary", "TPP=1"): "did you mean TP",
        ("Tiny-Qwen3", "--vary", "MBS=3,5"): "none of the 2 points can run",
        ("Tiny-Qwen3", "--vary", "MBS=1,2", "--budget-node-hours", "0.001"): "cheapest point",
        ("Tiny-Qwen4", "--vary", "MBS=1,2"): "did you mean Tiny-Qwen3",
        ("--resume", "nothing"): "there is no such sweep",
    }
    for words, expected in cases.items():
        done = run(tmp_path, *SWEEP, *words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs dir").exists(), "something was written"
