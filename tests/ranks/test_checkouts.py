"""Releases of Megatron-LM that MEGATRON_PATH may name: each trains on CPU ranks, two of them as one does.

    MEGATRON_CHECKOUTS=FOLDER bash tests/run.sh -m slow tests/ranks/test_checkouts.py

FOLDER holds trees named by their tag (`git worktree add FOLDER/core_v0.18.0 core_v0.18.0`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.results.reader import read_steps
from tests.support.training import CPU_FLAGS, DEEPSEEK_LIKE, QWEN3_LIKE

ROOT = Path(__file__).parents[2]
CHECKOUTS = os.environ.get("MEGATRON_CHECKOUTS", "")
STEPS = 5


def train(checkout: str, model: list[str], nproc: int, run_dir: Path) -> list[dict[str, float]]:
    """The losses of each step."""
    run_dir.mkdir()
    flags = [*CPU_FLAGS, *model, "--train-iters", str(STEPS), "--use-distributed-optimizer"]
    flags += ["--expert-model-parallel-size", str(nproc)]
    command = [sys.executable, "-m", "moe_bench.runtime.local", "--nproc", str(nproc), "--"]
    variables = os.environ | {
        "MEGATRON_PATH": str(Path(CHECKOUTS) / checkout),
        "MOE_BENCH_RUN_DIR": str(run_dir),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    ended = subprocess.run(
        [*command, *flags], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [dict(step.losses) for step in read_steps(run_dir).records]


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_CHECKOUTS names no folder of checkouts")
@pytest.mark.parametrize("model", [QWEN3_LIKE, DEEPSEEK_LIKE], ids=["qwen3", "deepseek"])
@pytest.mark.parametrize("checkout", ["core_v0.17.0", "core_v0.18.0", "core_v0.19.0"])
def test_a_release_trains_on_two_ranks_as_on_one(
    checkout: str, model: list[str], tmp_path: Path
) -> None:
    one, two = (train(checkout, model, nproc, tmp_path / str(nproc)) for nproc in (1, 2))
    assert len(one) == STEPS
    assert one[-1]["lm loss"] < one[0]["lm loss"]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
