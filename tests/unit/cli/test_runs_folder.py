"""The verbs that read runs look where a launch would write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli._runs_folder import runs_folder
from tests.support.projects import REPOSITORY


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, REPOSITORY / "runs"),
        ({"OUTPUT_PATH": ""}, REPOSITORY / "runs"),
        ({"OUTPUT_PATH": "rel"}, REPOSITORY / "rel"),
        ({"OUTPUT_PATH": "/abs"}, Path("/abs")),
        ({"WORKSPACE": "/ws"}, Path("/ws/runs")),
        ({"WORKSPACE": "/ws", "OUTPUT_PATH": "rel"}, REPOSITORY / "rel"),
    ],
)
def test_a_relative_output_path_starts_in_the_project(given: dict[str, str], folder: Path) -> None:
    assert runs_folder(given) == folder


@pytest.mark.parametrize(
    ("words", "shown"), [((), str(REPOSITORY / "rel")), (("--output-path", "rel"), "rel")]
)
def test_the_variable_starts_in_the_project_and_the_option_where_the_caller_stands(
    words: tuple[str, ...], shown: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_bench", "runs", *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "OUTPUT_PATH": "rel"},
    )
    assert done.stdout.startswith(f"no runs in {shown} yet")
