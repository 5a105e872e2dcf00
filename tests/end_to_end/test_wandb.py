"""A real training mirrored to W&B offline: what its user sees, and where the key is (nowhere)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.results.dashboard import read_dashboard
from moe_bench.results.reader import read_steps
from tests.support.projects import REPOSITORY
from tests.support.wandb_files import read_offline

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's directory and what the terminal showed."""
    folder = tmp_path_factory.mktemp("wandb")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "MOE_BENCH_PYTHON": sys.executable,
        "OUTPUT_PATH": str(folder / "runs"),
        "RUN_ID": "run",
        "MOE_BENCH_DEVICE": "cpu",
        "MODEL": "Tiny-Qwen3",
        "SEQ_LEN": "64",
        "EP": "2",
        "TRAIN_ITERS": "4",
        "COMMENT": "a-comment",
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "offline",
        "WANDB_PROJECT": "bench",
        "WANDB_RUN_GROUP": "a-group",
        "WANDB_X_STATS_SAMPLING_INTERVAL": "0.5",
    }
    script = ["bash", str(REPOSITORY / "interactive_benchmarking.sh")]
    flags = ["--mock-data", "--eval-iters", "1", "--eval-interval", "2", "--timing-log-level", "1"]
    done = subprocess.run(
        [*script, *flags], env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return folder / "runs" / "run", said


@pytest.mark.slow
def test_every_panel_of_the_dashboard_has_its_metric_in_a_real_run(
    trained: tuple[Path, str],
) -> None:
    history = read_offline(trained[0]).history
    names = {name for row in history for name in row}
    for panel in read_dashboard().panels:
        if panel.needs is None:
            assert set(panel.metrics) <= names, panel.title
            if panel.regex:
                assert [one for one in names if re.fullmatch(panel.regex, one)], panel.title


@pytest.mark.slow
def test_the_mirror_equals_the_record(trained: tuple[Path, str]) -> None:
    steps = read_steps(trained[0]).records
    rows = [row for row in read_offline(trained[0]).history if "loss/lm loss" in row]
    assert [row["loss/lm loss"] for row in rows] == [step.loss for step in steps]
    assert [row["speed/tokens_per_s"] for row in rows] == [step.tokens_per_s for step in steps]


@pytest.mark.slow
def test_the_run_is_named_and_grouped_and_watched_as_the_user_asked(
    trained: tuple[Path, str],
) -> None:
    found = read_offline(trained[0])
    assert (found.run.project, found.run.run_group) == ("bench", "a-group")
    assert found.run.display_name.endswith("a-comment")
    assert found.config["origins"]["knobs"]["EP"] == "environment"
    assert "cpu" in found.system


@pytest.mark.slow
def test_the_sync_command_is_printed_at_the_end(trained: tuple[Path, str]) -> None:
    run_dir, said = trained
    [folder] = (run_dir / "wandb").glob("offline-run-*")
    assert f"-m wandb sync {folder}" in said


@pytest.mark.slow
def test_the_key_is_nowhere(trained: tuple[Path, str]) -> None:
    run_dir, said = trained
    assert KEY not in said
    for path in run_dir.parents[1].rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
