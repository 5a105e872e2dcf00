"""WORKSPACE says where presets and .conf files are; what runs is this project all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY, Project

LAUNCH = [sys.executable, "-m", "moe_bench", "launch", "local"]
SCRIPTS = [LAUNCH, ["bash", str(REPOSITORY / "interactive_benchmarking.sh")]]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    project = Project(tmp_path / "recipes")
    model = project.root / "model_configs" / "benchmarking" / "Tiny-Test.yaml"
    model.rename(model.with_name("Tiny-Mine.yaml"))
    return project.root


def dry_run(command: list[str], workspace: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"PYTHONPATH": str(REPOSITORY), "MOE_BENCH_PYTHON": sys.executable}
    environment |= {"WORKSPACE": str(workspace), "MODEL": "Tiny-Mine", "DRY_RUN": "1"}
    environment |= {"MOE_BENCH_DEVICE": "cpu", "RUN_ID": "r"} | knobs
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=workspace
    )


@pytest.mark.parametrize("command", SCRIPTS, ids=["python", "script"])
def test_presets_are_the_workspaces_and_code_is_this_projects(
    command: list[str], workspace: Path
) -> None:
    done = dry_run([*command, "--mock-data"], workspace)
    assert done.returncode == 0, done.stderr
    assert f"\ncd {REPOSITORY}\n" in done.stdout
    assert f"{REPOSITORY}/moe_bench/launch/templates/local.sh" in done.stdout
    assert f"MOE_BENCH_RUN_DIR={workspace}/runs/r\n" in done.stdout


def test_a_workspace_without_presets_is_refused(tmp_path: Path) -> None:
    done = dry_run(LAUNCH, tmp_path)
    assert done.returncode == 2
    assert f"WORKSPACE={tmp_path} (environment) holds no model_configs/benchmarking" in done.stderr


@pytest.mark.parametrize("name", ["interactive", "sbatch"])
def test_a_script_tells_no_workspace_where_the_caller_names_none(name: str, tmp_path: Path) -> None:
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\n[ "$1" = - ] || echo "WORKSPACE=${WORKSPACE-unset}"\n')
    said.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "MOE_BENCH_PYTHON": str(said)}
    script = REPOSITORY / f"{name}_benchmarking.sh"
    for given, value in (({}, "unset"), ({"WORKSPACE": "/ws"}, "/ws")):
        done = subprocess.run(
            ["bash", script], env=environment | given, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"WORKSPACE={value}\n"
