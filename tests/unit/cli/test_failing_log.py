"""Which log is shown of a run that failed: that of the rank which failed first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_bench.cli._watching import failing_log
from moe_bench.results.records import Event
from moe_bench.results.writer import RunWriter

TORCHRUN = """\
============================================================
bash FAILED
------------------------------------------------------------
Failures:
[0]:
  time      : 2026-11-18_11:06:40
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 2 (pid: 4711)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
------------------------------------------------------------
Root Cause (first observed failure):
[1]:
  time      : 2026-11-18_11:06:39
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 2 (pid: 4712)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""
"""What torchrun of torch 2.11 said of two ranks, of which the second failed first."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    for rank in range(3):
        (tmp_path / "logs" / f"rank-{rank}.log").write_text(f"of rank {rank}\n")
    (tmp_path / "logs" / "launch.log").write_text(TORCHRUN)
    return tmp_path


def test_torchrun_names_the_rank_that_ended_before_it_could_record(run_dir: Path) -> None:
    assert failing_log(run_dir).read_text() == "of rank 1\n"


def test_the_record_knows_better_than_torchrun(run_dir: Path) -> None:
    writer = RunWriter(run_dir, rank=2)
    writer.event(Event(event="error", time_unix_s=time.time(), rank=2, fields={"message": "x"}))
    writer.close()
    assert failing_log(run_dir).read_text() == "of rank 2\n"


def test_without_ranks_it_is_the_launchers(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launch.log").write_text("bash: nsys: command not found\n")
    assert failing_log(tmp_path) == tmp_path / "logs" / "launch.log"
