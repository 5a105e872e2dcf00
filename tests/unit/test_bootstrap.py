"""Which Python runs moe_bench, and what is put beside it. The Python is real; pip only says what it was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY

LIGHT = ("click", "jinja2", "msgspec", "rich", "yaml")
PIP = """
import json, os, sys
with open(os.environ["PIP_SAID"], "a") as said:
    said.write(json.dumps([os.environ.get("PIP_CONSTRAINT"), sys.argv[1:]]) + "\\n")
"""


class Machine:
    """A project without locks' packages, and one environment on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project"
        self.project.mkdir()
        (self.project / "locks").symlink_to(REPOSITORY / "locks")
        self.said = root / "pip"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = root / "env" / "lib" / version / "site-packages"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
        self.install("pip")
        (self.site / "pip" / "__main__.py").write_text(PIP)

    def install(self, *names: str) -> None:
        for name in names:
            folder = self.site / name.replace(".", "/")
            folder.mkdir(parents=True)
            (folder / "__init__.py").touch()

    def bootstrap(self, what: str, **environment: str) -> tuple[str, list[list[object]]]:
        """The Python that was chosen, and each call of pip: (constraints, arguments)."""
        program = f"source {REPOSITORY}/moe_bench/bootstrap.sh; bootstrap {what}; echo $PYTHON"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", program],
            env={
                "PATH": f"{self.root}/env/bin:{os.environ['PATH']}",
                "WORKSPACE": str(self.project),
                "PIP_SAID": str(self.said),
                "PIP_CONSTRAINT": "/etc/pip/constraint.txt",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        calls = self.said.read_text().splitlines() if self.said.exists() else []
        return done.stdout.strip(), [json.loads(call) for call in calls]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def locks(calls: list[list[object]]) -> list[str]:
    return [
        Path(str(words[words.index("-r") + 1])).name  # type: ignore[attr-defined, index]
        for _, words in calls
    ]


def test_an_ngc_image_is_used_and_given_megatron_core_beside_its_own_torch(
    machine: Machine,
) -> None:
    machine.install("torch", "transformer_engine")
    python, calls = machine.bootstrap("train")
    assert python == f"{machine.root}/env/bin/python3"
    assert locks(calls) == ["login.txt", "container.txt"]
    assert "torch==" not in (REPOSITORY / "locks" / "container.txt").read_text()
    for constraints, words in calls:
        assert constraints is None, "an image pins packages of its own that differ from the lock"
        assert words[words.index("--target") + 1] == f"{machine.project}/.deps"  # type: ignore[attr-defined, index]
    assert "--no-deps" in calls[1][1]  # type: ignore[operator]


def test_an_environment_with_everything_is_used_as_it_is(machine: Machine) -> None:
    machine.install("torch", "megatron", "megatron.core", "megatron.training", *LIGHT)
    assert machine.bootstrap("train") == (f"{machine.root}/env/bin/python3", [])


def test_a_megatron_core_without_its_training_is_given_one_that_has_it(machine: Machine) -> None:
    machine.install("torch", "megatron", "megatron.core", *LIGHT)
    assert locks(machine.bootstrap("train")[1]) == ["container.txt"]


def test_a_checkout_needs_no_megatron_core(machine: Machine) -> None:
    machine.install("torch", "transformer_engine", *LIGHT)
    _, calls = machine.bootstrap("train", MEGATRON_PATH="/opt/Megatron-LM")
    assert calls == []


def test_to_submit_a_job_needs_no_megatron(machine: Machine) -> None:
    machine.install("torch", "transformer_engine")
    assert locks(machine.bootstrap("login")[1]) == ["login.txt"]


def test_a_torch_without_megatron_or_transformer_engine_is_not_taken_for_ready(
    machine: Machine,
) -> None:
    machine.install("torch")
    source = f"source {REPOSITORY}/moe_bench/bootstrap.sh"
    command = f"{source}; bootstrap_is_ready {machine.root}/env/bin/python3"
    done = subprocess.run(["bash", "-c", command], check=False)
    assert done.returncode == 1


def test_a_named_python_that_is_none_is_refused_and_nothing_is_installed(tmp_path: Path) -> None:
    command = f"source {REPOSITORY}/moe_bench/bootstrap.sh; bootstrap train"
    given = {"PATH": "/usr/bin:/bin", "WORKSPACE": str(tmp_path), "MOE_BENCH_PYTHON": "/bin/false"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: MOE_BENCH_PYTHON=/bin/false (environment) runs no Python")
    assert list(tmp_path.iterdir()) == []
