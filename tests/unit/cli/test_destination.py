"""`explain` and `lint` are about the run that would start: here, or as it would be submitted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli._destination import destination, request_described
from tests.support.projects import REPOSITORY

HERE, SUBMITTED, SOMEWHERE = (
    "on this machine",
    "as it would be submitted",
    "on a cluster with an image",
)


@pytest.mark.parametrize(
    ("given", "here", "expected"),
    [
        ({}, None, HERE),
        ({"MODEL": "DeepSeek-V3"}, None, SOMEWHERE),
        ({"MODEL": "DeepSeek-V3"}, True, HERE),
        ({"MODEL": "DeepSeek-V3"}, False, SUBMITTED),
        ({"MODEL": "DeepSeek-V3", "REHEARSE": "1", "CLUSTER": "ours"}, None, HERE),
        ({"MODEL": "DeepSeek-V3", "MOE_BENCH_DEVICE": "cpu"}, None, HERE),
        ({"MODEL": "DeepSeek-V3", "CLUSTER": "local"}, None, SUBMITTED),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "local"}, None, HERE),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "local", "LAUNCHER": "slurm"}, None, SUBMITTED),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "ours"}, None, SUBMITTED),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "ours"}, True, HERE),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "ours", "LAUNCHER": "local"}, None, HERE),
        ({"MODEL": "Tiny-Qwen3", "CLUSTER": "ours", "MOE_BENCH_DEVICE": "cpu"}, None, SUBMITTED),
    ],
)
def test_the_environment_or_an_option_says_where(
    given: dict[str, str], here: bool | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODEL", "CLUSTER", "LAUNCHER", "REHEARSE", "MOE_BENCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert destination(request_described((), here=here)) == expected


def test_the_verbs_own_model_counts_more_than_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODEL", "Tiny-Qwen3")
    monkeypatch.delenv("CLUSTER", raising=False)
    monkeypatch.delenv("MOE_BENCH_DEVICE", raising=False)
    request = request_described((), here=None, model="DeepSeek-V3")
    assert request.environment["MODEL"] == "DeepSeek-V3"
    assert destination(request) == SOMEWHERE


def moe_bench(tmp_path: Path, *words: str, **knobs: str) -> subprocess.CompletedProcess[str]:
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "OUTPUT_PATH": str(tmp_path / "runs"),
        "RUN_ID": "r",
        "DRY_RUN": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", *words],
        env=given | knobs,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def workspace(tmp_path: Path) -> str:
    """A project with a cluster `ours` of nodes without GPUs."""
    clusters = tmp_path / "cluster_configs" / "benchmarking"
    clusters.mkdir(parents=True)
    (clusters / "ours.conf").write_text("export GPUS_PER_NODE=${GPUS_PER_NODE:-2}\n")
    for name in ("model_configs", "runtime_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return str(tmp_path)


@pytest.mark.parametrize(
    "knobs",
    [
        {"MODEL": "Qwen3-30B-A3B"},
        {"MODEL": "Tiny-Qwen3", "MOE_BENCH_DEVICE": "cpu", "NNODES": "2", "GBS": "16"},
    ],
    ids=["bare metal", "nodes without GPUs"],
)
def test_explain_shows_the_flags_that_are_submitted(
    knobs: dict[str, str], workspace: str, tmp_path: Path
) -> None:
    knobs |= {"WORKSPACE": workspace, "CLUSTER": "ours"}
    explained = moe_bench(tmp_path, "explain", "--json", **knobs)
    assert explained.returncode == 0, explained.stderr
    submitted = moe_bench(tmp_path, "launch", "slurm", **knobs)
    assert submitted.returncode == 0, submitted.stderr
    run = json.loads(explained.stdout)
    for flag, setting in run["args"].items():
        words = setting["words"] or ([] if setting["value"] == "true" else [setting["value"]])
        assert f"\n    {' '.join([flag, *words])} " in submitted.stdout.replace("'", "")
    assert f"#SBATCH --nodes={run['knobs']['NNODES']['value']}\n" in submitted.stdout


def test_lint_says_what_a_submission_without_an_image_replaces(
    workspace: str, tmp_path: Path
) -> None:
    knobs = {"WORKSPACE": workspace, "CLUSTER": "ours", "MODEL": "Qwen3-30B-A3B"}
    said = moe_bench(tmp_path, "launch", "slurm", **knobs).stderr
    linted = moe_bench(tmp_path, "lint", **knobs).stdout
    for asked, used in re.findall(r"substituted: (.*) -> (.*) \(", said):
        assert f"left-out: {asked} -> {used}: " in linted
