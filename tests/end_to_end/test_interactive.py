"""`interactive_benchmarking.sh` as a user runs it: one run that ends, one that is interrupted, one that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from moe_bench.config.run import ResolvedRun
from moe_bench.results.reader import read_steps
from tests.support.projects import REPOSITORY

SCRIPT = ["bash", str(REPOSITORY / "interactive_benchmarking.sh"), "--mock-data"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    given |= {
        "TMPDIR": str(tmp_path / "tmp"),
        "MOE_BENCH_PYTHON": sys.executable,
        "OUTPUT_PATH": str(tmp_path / "runs dir"),
        "RUN_ID": "run",
    }
    return given | {"MOE_BENCH_DEVICE": "cpu", "MODEL": "Tiny-Qwen3", "SEQ_LEN": "64"} | more


def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs dir" / "run"


def left_behind(tmp_path: Path) -> list[str]:
    """What a run leaves outside its own directory, but for the cache of torch's compiler."""
    names = (path.name for path in (tmp_path / "tmp").iterdir())
    return [name for name in names if not name.startswith("torchinductor_")]


def test_a_run_with_two_expert_ranks_trains_records_and_summarizes(tmp_path: Path) -> None:
    given = environment(tmp_path, TRAIN_ITERS="4", EP="2")
    done = subprocess.run(
        [*SCRIPT, "--eval-iters", "0"],
        env=given,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read_steps(run_dir(tmp_path)).records
    assert [step.step for step in steps] == [1, 2, 3, 4]
    run = ResolvedRun.from_json((run_dir(tmp_path) / "run.json").read_bytes())
    assert run.args["--expert-model-parallel-size"].value == "2"
    assert str(run_dir(tmp_path)) in done.stdout
    dry = subprocess.run(
        [*SCRIPT, "--eval-iters", "0"],
        env=given | {"DRY_RUN": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert dry.stdout == (run_dir(tmp_path) / "launch.sh").read_text(), (
        "the dry run shows other bytes than ran"
    )
    assert left_behind(tmp_path) == []


def test_an_interrupt_stops_the_ranks_and_closes_the_record(tmp_path: Path) -> None:
    process = subprocess.Popen(
        SCRIPT,
        env=environment(tmp_path, TRAIN_ITERS="5000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step "):
            os.killpg(process.pid, signal.SIGINT)
            break
    said += process.stdout.readlines()
    assert process.wait(timeout=240) == 130, "".join(said)
    ends = [
        json.loads(line)
        for path in (run_dir(tmp_path) / "results").glob("events*.jsonl")
        for line in path.read_text().splitlines()
        if '"event":"end"' in line
    ]
    assert ends
    left = subprocess.run(
        ["pgrep", "-f", str(run_dir(tmp_path))], capture_output=True, text=True, check=False
    )
    assert left.stdout == ""
    assert left_behind(tmp_path) == []


def test_a_failing_rank_is_shown_in_its_own_words_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a line of text\n" * 200)
    prepare = [sys.executable, "-m", "moe_bench", "data", "prepare", str(tmp_path / "lines.txt")]
    prepare += ["--text", "line", "--tokenizer", "bytes", "--output", str(tmp_path / "text")]
    subprocess.run(prepare, check=True, capture_output=True, cwd=REPOSITORY)
    (tmp_path / "text.bin").write_bytes(b"")
    done = subprocess.run(
        [*SCRIPT[:2], "--train-iters", "5"],
        env=environment(tmp_path) | {"DATA_PATH": str(tmp_path / "text")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "error: the run failed" in done.stderr
    assert "cannot mmap an empty file" in done.stderr
    lines = (run_dir(tmp_path) / "results" / "events-launcher.jsonl").read_text().splitlines()[1:]
    error, end = (json.loads(line) for line in lines)
    assert "failed first" in error["fields"]["message"]
    assert "cannot mmap an empty file" in error["fields"]["tail"]
    assert end["fields"]["outcome"] == "failed"
