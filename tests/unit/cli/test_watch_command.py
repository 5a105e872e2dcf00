"""A submission says how to watch it: that very command finds the run, wherever OUTPUT_PATH was written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY


def moe_bench(tmp_path: Path, *words: str, **knobs: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", *words],
        env=given | knobs,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A project whose cluster file says where runs are written, and an sbatch that takes every job."""
    project = tmp_path / "project"
    clusters = project / "cluster_configs" / "benchmarking"
    clusters.mkdir(parents=True)
    (clusters / "ours.conf").write_text(f"export OUTPUT_PATH=${{OUTPUT_PATH:-{tmp_path}/lustre}}\n")
    for name in ("model_configs", "runtime_configs"):
        (project / name).symlink_to(REPOSITORY / name)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    return project


@pytest.mark.parametrize(
    ("shell", "named"), [({}, "{}/lustre/r"), ({"OUTPUT_PATH": "{}/mine"}, "r")]
)
def test_the_command_that_a_submission_prints_finds_the_run(
    shell: dict[str, str], named: str, workspace: Path, tmp_path: Path
) -> None:
    shell = {name: value.format(tmp_path) for name, value in shell.items()}
    submitted = moe_bench(
        tmp_path,
        *("launch", "slurm", "--mock-data"),
        WORKSPACE=str(workspace),
        MODEL="Tiny-Qwen3",
        CLUSTER="ours",
        MOE_BENCH_DEVICE="cpu",
        GPUS_PER_NODE="2",
        RUN_ID="r",
        **shell,
    )
    assert submitted.returncode == 0, submitted.stderr
    last = submitted.stdout.splitlines()[-1]
    words = shlex.split(last.removeprefix("watch it with: python -m moe_bench "))
    assert words == ["status", named.format(tmp_path)]
    watched = moe_bench(tmp_path, *words, **shell)
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.startswith("r  ")
