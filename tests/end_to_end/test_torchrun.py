"""The script of a GPU node, its ranks started by torchrun, run on a CPU: only the machine it was resolved for differs."""

from __future__ import annotations

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
    launcher = LocalLauncher(project=REPOSITORY, python=sys.executable, device="cuda")
    plan = launcher.render(run)
    directory.create(run, plan)
    return local.start(plan, run)


def test_ranks_below_torchrun_keep_their_logs_and_save_when_they_are_asked_to_stop(
    tmp_path: Path,
) -> None:
    run = resolved(tmp_path)
    process = started(run)
    deadline_s = time.monotonic() + 240
    while not read_steps(run.run_dir).records and time.monotonic() < deadline_s:
        assert process.poll() is None, (run.run_dir / local.LOG).read_text()
        time.sleep(0.5)

    status = local.stop(process, run.run_dir, has_ended=lambda: False, patience_s=120)

    assert status == 0, "torchrun's agent saw its ranks fail"
    (end,) = (event for event in read_events(run.run_dir).records if event.event == "end")
    last = len(read_steps(run.run_dir).records)
    assert end.fields["outcome"] == "stopped"
    assert (tmp_path / "run" / "checkpoints" / f"iter_{last:07d}" / ".metadata").is_file()
    assert [path.name for path in sorted((run.run_dir / "logs").glob("rank-*"))] == [
        "rank-0.log",
        "rank-1.log",
    ]
    assert f"iteration {last:8d}/" in (run.run_dir / "logs" / "rank-1.log").read_text()
