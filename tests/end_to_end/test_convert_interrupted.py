"""kill -9 at random moments: the same command goes on, and the result is the same to the byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_bench.checkpoint.output import LEDGER, begun
from moe_bench.checkpoint.workers import Work, run_tasks
from moe_bench.errors import CheckpointError
from tests.support import hf_models
from tests.support.processes import living, wait_for_end
from tests.unit.checkpoint.test_round_trip import hashes

CONFIG = {
    **hf_models.QWEN3,
    "hidden_size": 512,
    "vocab_size": 5001,
    "moe_intermediate_size": 384,
    "num_experts": 13,
    "num_hidden_layers": 5,
}


WORKERS = 2  # of an import, by default


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 90 MB: some twenty files of output."""
    return hf_models.make_model(tmp_path_factory.mktemp("hf"), CONFIG, shards=3)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe_bench", "convert", *map(str, arguments)]


def run(*arguments: object) -> str:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_after(delay_s: float, *arguments: object) -> int:
    """Start the command, kill -9 its parent process after the delay; the group of its workers."""
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(delay_s)
    process.kill()
    process.wait()
    return process.pid


def interrupted(hf: Path, out: Path, delay_s: float) -> tuple[int, str]:
    """(units whole before the second run, the second run's words)."""
    workers = kill_after(delay_s, "import", hf, out)
    wait_for_end(workers)  # the kernel tells them of their parent's death
    ledger = out / ".convert"
    if (
        out / "latest_checkpointed_iteration.txt"
    ).exists():  # killed in its very last act, or later
        return 0, run("import", hf, out)
    assert ledger.exists() or not out.exists()
    whole = len([p for p in ledger.glob("unit-*") if not p.name.endswith(".tmp")])
    begun = len(list((out / "release").glob("__[0-9]*")))
    assert begun - whole <= WORKERS, "more than one file a worker is redone"
    return whole, run("import", hf, out)


def campaign(hf: Path, folder: Path, trials: int, seed: int) -> int:
    """Kill at random moments; return how many runs were really interrupted while they wrote."""
    started = time.monotonic()
    run("import", hf, folder / "reference")
    duration = time.monotonic() - started
    expected = hashes(folder / "reference")
    chance = random.Random(seed)
    while_writing = 0
    for trial in range(trials):
        out = folder / f"trial{trial}"
        whole, words = interrupted(hf, out, chance.uniform(0.15, 1.0) * duration)
        assert hashes(out) == expected, f"trial {trial}"
        if whole:
            assert f"{whole} files were already there" in words
            while_writing += 1
    return while_writing


def test_killed_imports_resume_to_the_same_bytes(hf: Path, tmp_path: Path) -> None:
    campaign(hf, tmp_path, trials=3, seed=1)


@pytest.mark.slow
def test_twenty_killed_imports_resume_to_the_same_bytes(hf: Path, tmp_path: Path) -> None:
    assert campaign(hf, tmp_path, trials=20, seed=2) >= 1


def test_a_killed_export_resumes_to_the_same_bytes(hf: Path, tmp_path: Path) -> None:
    run("import", hf, tmp_path / "megatron")
    run("export", tmp_path / "megatron", tmp_path / "reference")
    for trial, delay_s in enumerate((0.15, 0.25, 0.35)):
        out = tmp_path / f"out{trial}"
        kill_after(delay_s, "export", tmp_path / "megatron", out)
        run("export", tmp_path / "megatron", out)
        assert hashes(out) == hashes(tmp_path / "reference")


def test_two_machines_share_the_work_through_the_folder(hf: Path, tmp_path: Path) -> None:
    run("import", hf, tmp_path / "reference")
    nodes = [
        subprocess.Popen(
            command("import", hf, tmp_path / "out", "--node", f"{i}/2", "--processes", 1),
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    words = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], words
    assert hashes(tmp_path / "out") == hashes(tmp_path / "reference")


def test_a_machine_that_comes_while_another_begins_takes_no_part_of_it_for_a_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Path.iterdir

    def begun_meanwhile(folder: Path) -> Iterator[Path]:
        (folder / LEDGER).mkdir()
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    (tmp_path / "out").mkdir()
    with begun(tmp_path / "out", "identity", node=1) as ledger:
        assert ledger == tmp_path / "out" / LEDGER


def test_ctrl_c_says_how_to_go_on(hf: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("import", hf, tmp_path / "out"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("out/.convert/unit-0")):
        assert process.poll() is None, "it was done before it could be stopped"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("error: stopped; run the same command again to go on from there\n")
    assert "Traceback" not in said
    assert living(process.pid) == []


def test_a_worker_that_is_killed_stops_the_import_with_a_reason() -> None:
    def start() -> Work:
        def work(task: int) -> int:
            if task == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return task

        return work

    with pytest.raises(CheckpointError, match="ended by SIGKILL; the machine may be out of memory"):
        list(run_tasks(range(8), start, processes=2))


def test_a_full_disk_is_said_and_the_import_resumes_when_there_is_room(
    hf: Path, tmp_path: Path
) -> None:
    """The file-size limit stands in for the disk: the kernel refuses the write either way."""
    out = tmp_path / "out"
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 2000; trap "" XFSZ; exec "$@"', "-", *command("import", hf, out)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert limited.returncode == 2
    assert "distcp.part: cannot be written: File too large" in limited.stderr
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    run("import", hf, out)
    assert run("verify", hf, out).endswith("the same\n")
