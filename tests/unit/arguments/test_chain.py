"""DEPENDENCY=singleton: where the jobs of one name save, and what they go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.arguments.chain import CHAIN_VARIABLE
from tests.support.projects import Project

CHAIN = {"DEPENDENCY": "singleton", "RUN_NAME": "long run", "ACCOUNT": "team"}


def test_runs_of_one_name_and_model_share_a_folder_beside_their_own(tmp_path: Path) -> None:
    run = Project(tmp_path).resolve({**CHAIN, "OUTPUT_PATH": "/runs"})
    assert run.args["--save"].value == "/runs/chains/team-moe-long_run-Tiny-Test"
    assert run.env[CHAIN_VARIABLE].value == run.args["--save"].value
    assert any("goes on from the newest one there" in note for note in run.notes)


@pytest.mark.parametrize("dependency", ["afterok:7", "afterany:7:8", "expand:7"])
def test_another_dependency_changes_nothing(dependency: str, tmp_path: Path) -> None:
    run = Project(tmp_path).resolve({**CHAIN, "DEPENDENCY": dependency})
    assert "--save" not in run.args
    assert CHAIN_VARIABLE not in run.env


def test_singleton_among_others_is_found(tmp_path: Path) -> None:
    run = Project(tmp_path).resolve({**CHAIN, "DEPENDENCY": "afterok:7,singleton"})
    assert CHAIN_VARIABLE in run.env


def test_a_save_of_the_callers_own_is_what_the_chain_shares(tmp_path: Path) -> None:
    run = Project(tmp_path).resolve(CHAIN, ["--save", "/mine"])
    assert run.args["--save"].value == "/mine"
    assert run.env[CHAIN_VARIABLE].value == "/mine"


def test_a_models_own_save_gives_way_and_is_remembered(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.add_flags("--save: ${OUTPUT_PATH}/checkpoints")
    save = project.resolve(CHAIN).args["--save"]
    assert "/chains/" in save.value
    assert save.overrode[0].value.endswith("/run/checkpoints")
