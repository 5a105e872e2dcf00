"""What Slurm's tools answer, read from tools that answer like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import LaunchError
from moe_bench.launch import queue


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put programs of these names on an otherwise plain PATH."""
    for name, body in scripts.items():
        program = folder / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    monkeypatch.setenv(
        "PATH", f"{folder}:/usr/bin:/bin" if "squeue" not in scripts else f"{folder}:/bin"
    )


def test_a_pending_job_says_why_in_plain_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(tmp_path, monkeypatch, squeue="echo '7|PENDING|DependencyNeverSatisfied|0:00|20:00|'")
    entry = queue.query(["7"])["7"]
    assert entry.state == "PENDING"
    assert "never start" in entry.explanation


def test_a_job_squeue_forgot_is_looked_up_in_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(
        tmp_path,
        monkeypatch,
        squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        sacct="echo '7|CANCELLED by 0|None|00:01:00|00:20:00|n1'",
    )
    entry = queue.query(["7"])["7"]
    assert entry.state == "CANCELLED"
    assert entry.ended


def test_accounting_switched_off_means_unknown_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(
        tmp_path,
        monkeypatch,
        squeue="echo 'Invalid job id specified' >&2; exit 1",
        sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1",
    )
    assert queue.query(["7"]) == {}


def test_a_silent_controller_is_an_error_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools(tmp_path, monkeypatch, squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(LaunchError, match="scontrol ping"):
        queue.query(["7"])
