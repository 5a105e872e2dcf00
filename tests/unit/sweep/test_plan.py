"""Points are resolved by the rules of a launch: what it would refuse is pruned, what it would run is the same run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.config.command_line import parse as parse_flags
from moe_bench.config.gather import Request
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import ConfigError, MoeBenchError
from moe_bench.launch.slurm import SlurmLauncher
from moe_bench.results.sweep_record import grouped
from moe_bench.sweep import arrays
from moe_bench.sweep.axes import parse
from moe_bench.sweep.plan import Asked, Check, SweepPlan, known_names, plan, refuse_none_legal
from tests.support.projects import GPUS, Project


def request(project: Project, *words: str, **environment: str) -> Request:
    given = {"PATH": "/usr/bin:/bin", "MODEL": "Tiny-Test", "MCORE_RELEASE_VERSION": "0.19"}
    given |= {"MAX_REQUEUES": "0", "RUN_TIME": "01:00:00", "GBS": "192"}
    return Request(environment=given | environment, words=words, project=project.root, local=False)


def planned(
    project: Project,
    *vary: str,
    words: tuple[str, ...] = (),
    check: Check | None = None,
    **environment: str,
) -> SweepPlan:
    base = request(project, *words, **environment)
    axes = parse(vary, lambda: known_names(base), parse_flags(words))
    asked = Asked(request=base, axes=axes, where="slurm")
    return plan(asked, GPUS, SlurmLauncher(workspace=project.root, python="python"), check)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def alone(project: Project, values: Mapping[str, str]) -> ResolvedRun | str:
    """What a launch of these values by themselves would resolve to, or refuse with."""
    flags = [f"{name}={value}" for name, value in values.items() if name.startswith("--")]
    knobs = {name: value for name, value in values.items() if not name.startswith("--")}
    asked = replace(request(project, *flags, **knobs), places=dict.fromkeys(values, "--vary"))
    try:
        return resolve_run(asked, GPUS, Identity(run_id="alone", folder=Path("/runs")))
    except MoeBenchError as error:
        return str(error)


def test_each_point_is_the_run_or_the_refusal_that_a_launch_would_give(project: Project) -> None:
    found = planned(project, "TP=1,2,3", "MBS=1,3", "--num-layers=4,6")
    assert len(found.candidates) + len(found.pruned) == 12
    assert found.candidates
    assert found.pruned
    for pruned in found.pruned:
        assert alone(project, pruned.values) == pruned.reason
    for one in found.candidates:
        run = alone(project, one.point.values)
        assert isinstance(run, ResolvedRun)
        own = str(one.run.run_dir)
        assert {name: s.value for name, s in run.args.items()} == {
            name: s.value.replace(own, "/runs/alone") for name, s in one.run.args.items()
        }
        assert {name: s.value for name, s in run.knobs.items()} == {
            name: s.value for name, s in one.run.knobs.items()
        }


def test_an_illegal_value_is_blamed_on_vary(project: Project) -> None:
    found = planned(project, "TP=1,3")
    [pruned] = found.pruned
    assert re.search(r"TP=3 .*--vary", pruned.reason)


def test_reasons_that_differ_only_in_numbers_are_one_group(project: Project) -> None:
    found = planned(project, "MBS=1,3,5,7", GBS="8")
    [(reason, members)] = grouped(found.pruned)
    assert len(members) == 3
    assert "MBS=3" in reason


def test_points_that_come_to_the_same_run_are_pruned_and_name_the_first(project: Project) -> None:
    found = planned(project, "REHEARSE_RANKS=2,4", "MBS=1,2")
    assert len(found.candidates) == 2
    assert [one.reason.split(":")[0] for one in found.pruned] == [
        "it is the same run as point 1 (REHEARSE_RANKS=2 MBS=1)",
        "it is the same run as point 2 (REHEARSE_RANKS=2 MBS=2)",
    ]


def test_a_sweep_without_a_legal_point_is_an_error_that_lists_why(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"none of the 2 points can run:(.|\n)*MBS=3"):
        refuse_none_legal(planned(project, "MBS=3,5", GBS="8"))


def test_an_unknown_flag_is_refused_in_every_point_with_the_nearest_name(project: Project) -> None:
    with pytest.raises(ConfigError, match="--min-lr"):
        refuse_none_legal(planned(project, "--min-lrr=1e-3,1e-4"))


def test_the_same_command_has_the_same_id_and_another_one_another(project: Project) -> None:
    first = planned(project, "MBS=1,2").sweep_id
    assert planned(project, "MBS=1,2").sweep_id == first
    assert planned(project, "MBS=1,4").sweep_id != first
    assert planned(project, "MBS=1,2", words=("--lr", "1")).sweep_id != first
    assert planned(project, "MBS=1,2", EP="2").sweep_id != first
    assert planned(project, "MBS=1,2", HOME="/elsewhere").sweep_id == first


def test_a_variable_of_the_models_yaml_may_vary_and_a_stranger_may_not(project: Project) -> None:
    project.add_flags("--seed: ${SEED_OF_MINE}")
    found = planned(project, "SEED_OF_MINE=1,2", SEED_OF_MINE="7")
    assert [one.run.args["--seed"].value for one in found.candidates] == ["1", "2"]
    with pytest.raises(ConfigError, match=r"SEED_OF_MIN is no knob.*SEED_OF_MINE"):
        planned(project, "SEED_OF_MIN=1,2", SEED_OF_MINE="7")


def test_every_point_is_in_one_wandb_group_and_carries_what_varies(project: Project) -> None:
    found = planned(project, "MBS=1,2")
    assert {one.run.env["WANDB_RUN_GROUP"].value for one in found.candidates} == {found.sweep_id}
    assert [dict(one.run.point.values) for one in found.candidates if one.run.point] == [
        {"MBS": "1"},
        {"MBS": "2"},
    ]
    assert [one.run.run_id for one in found.candidates] == ["1-MBS1", "2-MBS2"]


def test_points_that_need_other_nodes_or_time_are_arrays_of_their_own(project: Project) -> None:
    found = planned(project, "NNODES=1,2", "MBS=1,2", "RUN_TIME=01:00:00,02:00:00")
    launcher = SlurmLauncher(workspace=project.root, python="python")
    members = [(one.point, one.run) for one in found.candidates]
    made = arrays.render(launcher, members, Path("/sweeps/s"), limit=3)
    assert sorted(len(one.points) for one in made) == [2, 2, 2, 2]
    for one in made:
        [nodes] = re.findall(r"#SBATCH --nodes=(\d+)", one.script)
        [limit] = re.findall(r"#SBATCH --time=(\S+)", one.script)
        assert {point.values["NNODES"] for point in one.points} == {nodes}
        assert {point.values["RUN_TIME"] for point in one.points} == {limit}
        assert "#SBATCH --array=0-1%3\n" in one.script
        assert "--no-requeue" in one.script


def test_an_array_is_never_larger_than_slurm_takes(project: Project) -> None:
    found = planned(project, "MBS=1,2")
    launcher = SlurmLauncher(workspace=project.root, python="python")
    members = [(one.point, one.run) for one in found.candidates] * 600
    made = arrays.render(launcher, members, Path("/sweeps/s"), limit=None)
    assert [len(one.points) for one in made] == [1000, 200]


def test_points_that_differ_in_flags_alone_share_one_run_of_the_conf_files(
    project: Project,
) -> None:
    log = project.root / "ran"
    project.write("runtime_configs/benchmarking/common.conf", f"echo $MBS >>{log}\n")
    found = planned(project, "MBS=1,2", "--lr=1e-3,2e-3,3e-3")
    assert len(found.candidates) == 6
    assert sorted(log.read_text().split()) == ["1", "2"]


def test_what_a_further_authority_refuses_is_pruned_with_its_words(project: Project) -> None:
    found = planned(
        project,
        "MBS=1,2",
        check=lambda run: "no, says Megatron" if run.knobs["MBS"].value == "2" else None,
    )
    assert [one.point.values for one in found.candidates] == [{"MBS": "1"}]
    assert [one.reason for one in found.pruned] == ["no, says Megatron"]


def test_a_value_with_shell_characters_is_a_word_in_the_script_and_none_in_a_path(
    project: Project,
) -> None:
    hostile = "$(touch /tmp/x); `id` '|\"../../"
    found = planned(project, f"--vary=--wandb-exp-name={hostile},plain".removeprefix("--vary="))
    first = found.candidates[0]
    assert first.run.args["--wandb-exp-name"].value == hostile
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", first.point.name)
    assert first.run.run_dir.parent == found.candidates[1].run.run_dir.parent
    assert (
        subprocess.run(["bash", "-n"], input=first.plan.script, text=True, check=False).returncode
        == 0
    )
    assert shlex.quote(hostile) in first.plan.script
