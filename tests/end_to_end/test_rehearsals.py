"""Every preset's stand-in trains on this machine. Slow: `bash tests/run.sh -m slow tests/end_to_end/test_rehearsals.py`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.config.gather import MODELS
from moe_bench.config.run import ResolvedRun
from moe_bench.results.reader import read_steps
from tests.support.projects import REPOSITORY

PRESETS = sorted(path.stem for path in (REPOSITORY / MODELS).glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", PRESETS)
def test_a_rehearsed_preset_trains_two_steps(model: str, tmp_path: Path) -> None:
    given = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    given |= {"REHEARSE": "1", "MODEL": model, "TRAIN_ITERS": "2", "MOE_BENCH_DEVICE": "cpu"}
    given |= {"HF_HUB_OFFLINE": "1"}  # a tokenizer of the hub would fail the run
    given |= {"OUTPUT_PATH": str(tmp_path), "RUN_ID": "run", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "moe_bench", "launch", "local", "--mock-data"],
        env=given,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = ResolvedRun.from_json((tmp_path / "run" / "run.json").read_bytes())
    assert run.rehearsal
    steps = read_steps(tmp_path / "run").records
    assert [step.step for step in steps] == [1, 2]
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in steps)
