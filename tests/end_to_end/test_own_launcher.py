"""The launcher of docs/launch.md, as a user would add it, starts a training; what is wrong with one is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.results.reader import read_steps
from moe_bench.results.state import State, standing
from tests.support.projects import REPOSITORY

PATIENCE_S = 240


def example() -> str:
    """The page's Python."""
    page = (REPOSITORY / "docs" / "launch.md").read_text()
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def user(tmp_path: Path, launcher: str, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MOE_BENCH_PYTHON": sys.executable,
        "LAUNCHER": launcher,
        "OUTPUT_PATH": str(tmp_path / "runs"),
        "RUN_ID": "run",
        "MODEL": "Tiny-Qwen3",
        "CLUSTER": "local",
        "MCORE_RELEASE_VERSION": "0.19.2",
        "MOE_BENCH_DEVICE": "cpu",
        "NNODES": "1",
        "GPUS_PER_NODE": "2",
        "EP": "2",
        "SEQ_LEN": "64",
        "TRAIN_ITERS": "3",
    } | more


def run(*words: str, environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


SUBMIT = ("bash", str(REPOSITORY / "sbatch_benchmarking.sh"), "--mock-data", "--eval-iters", "0")


@pytest.mark.slow
def test_the_pages_launcher_trains(tmp_path: Path) -> None:
    (tmp_path / "my_launcher.py").write_text(example())
    environment = user(tmp_path, "./my_launcher.py:Background")
    dry = run(*SUBMIT, environment=environment | {"DRY_RUN": "1"}, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    done = run(*SUBMIT, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "run"
    assert dry.stdout == (run_dir / "launch.sh").read_text()

    anywhere = environment | {"PYTHONPATH": str(REPOSITORY)}
    status = (sys.executable, "-m", "moe_bench", "status", "run")
    assert "job" in run(*status, environment=anywhere, cwd=Path("/")).stdout
    deadline_s = time.monotonic() + PATIENCE_S
    while standing(run_dir).state is not State.COMPLETED:
        assert time.monotonic() < deadline_s, (run_dir / "logs" / "launch.log").read_text()[-3000:]
        time.sleep(0.5)
    assert [step.step for step in read_steps(run_dir).records] == [1, 2, 3]
    assert "completed" in run(*status, environment=anywhere, cwd=Path("/")).stdout


BROKEN = {
    "missing.py:Background": ("", "there is no file"),
    "empty.py:Background": ("", "has no class 'Background'"),
    "module.py:Background": ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
    "syntax.py:Background": ("class Background(:\n", "SyntaxError"),
    "arguments.py:Background": ("class Background:\n    pass\n", "called with project=Path"),
    "methods.py:Background": (
        "class Background:\n"
        "    def __init__(self, *, project, python): pass\n"
        "    def render(self, run): pass\n"
        "    def submit(self, plan, run): pass\n",
        "has no query, no cancel",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_launcher_that_cannot_be_used_is_named_with_why(tmp_path: Path, name: str) -> None:
    source, said = BROKEN[name]
    file = name.partition(":")[0]
    if file != "missing.py":
        (tmp_path / file).write_text(source)
    done = run(*SUBMIT, environment=user(tmp_path, f"./{name}"), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert file in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_name_that_nobody_brings_is_refused_with_the_nearest(tmp_path: Path) -> None:
    done = run(*SUBMIT, environment=user(tmp_path, "kubernets"), cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean kubernetes?" in done.stderr


def test_a_package_brings_a_launcher_by_an_entry_point(tmp_path: Path) -> None:
    """A package as pip lays it out, on PYTHONPATH."""
    package = tmp_path / "site"
    info = package / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "my_package.py").write_text(example())
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[moe_bench.launchers]\nbackground = my_package:Background\n"
    )
    environment = user(tmp_path, "background", DRY_RUN="1", PYTHONPATH=str(package))
    done = run(*SUBMIT, environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "moe_bench.runtime.local" in done.stdout
