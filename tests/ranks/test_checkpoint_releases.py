"""One converted checkpoint loads under two lines of Megatron-Core: common.pt for one, common_state for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.checkpoint.importing import COMMON, ImportOptions, run_import
from moe_bench.checkpoint.plan import plan_import
from moe_bench.checkpoint.torch_dist import open_torch_dist
from tests.support import hf_models

OLDER = "megatron-core==0.16.1"


def load(checkpoint: Path, **more: str) -> dict:
    script = Path(__file__).with_name("load_release.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(checkpoint)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older release, beside the installed one."""
    target = tmp_path_factory.mktemp("mcore")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        OLDER,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"{OLDER} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return target


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_two_releases_read_the_same_tensors_and_common_state(older: Path, tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.DEEPSEEK_V3)
    run_import(plan_import(hf), tmp_path / "out", ImportOptions())
    release = tmp_path / "out" / "release"
    ours, theirs = load(release), load(release, PYTHONPATH=str(older))
    assert theirs.pop("version") == OLDER.removeprefix("megatron-core==") != ours.pop("version")
    assert theirs == ours
    assert ours["common"] == COMMON
    assert set(ours["sha256"]) == set(open_torch_dist(release).tensors)
