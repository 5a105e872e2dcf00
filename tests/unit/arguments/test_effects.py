"""A knob that does nothing, weights and data other than one would think: said at every start."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.gather import RUNTIME
from moe_bench.errors import ConfigError
from tests.support.projects import TABLE, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_knob_that_the_models_yaml_does_not_read_is_said_with_the_flag_that_works(
    project: Project,
) -> None:
    (note,) = project.resolve({"LOAD_PATH": "/weights"}).notes
    assert note.startswith("LOAD_PATH=/weights (environment) changes nothing")
    assert "--load /weights" in note
    project.add_flags("--load: ${LOAD_PATH}")
    assert project.resolve({"LOAD_PATH": "/weights"}).notes == ()


def test_pretrain_0_without_a_checkpoint_is_said(project: Project) -> None:
    project.add_flags("--load: ${LOAD_PATH}")
    project.write(RUNTIME, TABLE + "export PRETRAIN=${PRETRAIN:-0}\n")
    (note,) = project.resolve().notes
    assert note.startswith("PRETRAIN=0 (runtime_configs/benchmarking/runtime.conf:")
    assert "training starts from scratch" in note
    assert project.resolve({"LOAD_PATH": "/weights"}).notes == ()
    assert project.resolve({"PRETRAIN": "1"}).notes == ()


def test_pretrain_1_with_a_checkpoint_is_said(project: Project) -> None:
    project.add_flags("--load: ${LOAD_PATH}")
    (note,) = project.resolve({"LOAD_PATH": "/weights", "PRETRAIN": "1"}).notes
    assert note.startswith(
        "PRETRAIN=1 (environment), but --load /weights (LOAD_PATH of environment"
    )


def test_a_run_without_data_says_that_megatron_makes_them_up(project: Project) -> None:
    (note,) = project.resolve(flags=["--data-path", "false"]).notes
    assert note.startswith("DATA_PATH is not set: Megatron trains on made-up tokens")
    assert project.resolve(flags=["--mock-data"]).notes == ()


def test_the_ranks_of_a_rehearsal_are_asked_for_in_vain_without_one(project: Project) -> None:
    (note,) = project.resolve({"REHEARSE_RANKS": "4"}).notes
    assert note == "REHEARSE_RANKS=4 (environment) changes nothing without REHEARSE=1"


def test_a_rehearsal_is_never_submitted(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"REHEARSE=1 \(environment\) .* on this machine"):
        project.resolve({"REHEARSE": "1"}, local=False)


def test_a_megatron_path_that_holds_none_ends_a_run_here_before_it_starts(
    project: Project, tmp_path: Path
) -> None:
    given = {"MEGATRON_PATH": str(tmp_path)}
    with pytest.raises(ConfigError, match=f"MEGATRON_PATH={tmp_path} .* no Megatron-LM checkout"):
        project.resolve(given, local=True)
    assert "cannot be read here" in project.resolve(given).notes[0]


def test_a_release_that_is_not_the_installed_one_is_said_where_that_one_runs(
    project: Project,
) -> None:
    given = {"MCORE_RELEASE_VERSION": "0.18.0"}
    note = project.resolve(given, local=True).notes[0]
    assert note.startswith("MCORE_RELEASE_VERSION=0.18.0 (environment), but megatron-core 0.19")
    assert project.resolve(given).notes == ()
