"""The script of a GPU node, started by hand, its ranks by torchrun, on a CPU: only the machine it was resolved for differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_bench.config.run import ResolvedRun
from moe_bench.launch import directory, local
from moe_bench.launch.local import LocalLauncher
from moe_bench.results.reader import read_events, read_steps
from tests.support.projects import CPU, REPOSITORY, repository


def resolved(tmp_path: Path) -> ResolvedRun:
    given = {"MODEL": "Tiny-Qwen3", "GPUS_PER_NODE": "2", "SEQ_LEN": "64", "EP": "2"}
    given |= {"TRAIN_ITERS": "100000", "OUTPUT_PATH": str(tmp_path), "RUN_ID": "run"}
    save = ["--mock-data", "--save", str(tmp_path / "run" / "checkpoints"), "--save-interval"]
    save += ["100000", "--eval-iters", "0"]
    return repository().resolve(given, save, machine=CPU, local=True)


def started(run: ResolvedRun) -> subprocess.Popen[bytes]:
    """As a shell with job control starts it: a process group of its own, to which a terminal sends Ctrl-C."""
    launcher = LocalLauncher(project=REPOSITORY, python=sys.executable, device="cuda")
    directory.create(run, launcher.render(run))
    with (run.run_dir / "said").open("wb") as said:
        return subprocess.Popen(
            ["bash", str(run.run_dir / local.SCRIPT)],
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_ranks_below_torchrun_keep_their_logs_and_save_when_the_script_is_interrupted(
    tmp_path: Path,
) -> None:
    run = resolved(tmp_path)
    process = started(run)
    try:
        deadline_s = time.monotonic() + 240
        while not read_steps(run.run_dir).records and time.monotonic() < deadline_s:
            assert process.poll() is None, (run.run_dir / "said").read_text()
            time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=120)
    finally:
        while process.poll() is None:  # the third kills
            process.terminate()
            time.sleep(1)

    said = (run.run_dir / "said").read_text()
    assert status == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    (end,) = (event for event in read_events(run.run_dir).records if event.event == "end")
    last = len(read_steps(run.run_dir).records)
    assert end.fields["outcome"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"iter_{last:07d}" / ".metadata").is_file()
    assert [path.name for path in sorted((run.run_dir / "logs").glob("rank-*"))] == [
        "rank-0.log",
        "rank-1.log",
    ]
    assert f"iteration {last:8d}/" in (run.run_dir / "logs" / "rank-1.log").read_text()
