"""One thing said twice, differently: refused, or the higher layer wins and what it overrode is kept. Never silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.arguments import schema
from moe_bench.arguments.schema.renames import renames
from moe_bench.config.gather import COMMON
from moe_bench.config.knobs import BOUND, KNOBS
from moe_bench.config.run import Origin, Setting
from moe_bench.errors import MoeBenchError
from tests.support.projects import Project

LINES = schema.release_lines()
MORE = {"PP": "2", "NUM_LAYERS": "8", "GBS": "16"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize("line", LINES)
def test_two_spellings_of_a_flag_that_differ_are_refused_in_every_release(line: str) -> None:
    known = schema.load(line)
    pairs = {
        (first, second)
        for spec in known.flags.values()
        for first in spec.options
        for second in spec.options
        if first < second and not (spec.is_switch and spec.kind != "boolean")
    }
    pairs |= {
        (entry.flags[0], other)
        for entry in renames().same
        for other in entry.flags[1:]
        if not {entry.flags[0], other} <= known.flags.keys()
    }
    for first, second in sorted(pairs):
        rules = {
            one.rule
            for one in known.check({first: _said(known, first, 0), second: _said(known, second, 1)})
        }
        assert rules & {"said-twice", "renamed-flag", "unknown-flag", "removed-flag"}, (
            first,
            second,
        )


def _said(known: schema.FlagSchema, flag: str, which: int) -> Setting:
    spec = known.flags.get(flag)
    origin = Origin(layer="flag", place="command line")
    if spec is None or spec.is_switch:
        return Setting(value="true", origin=origin)
    value = spec.choices[which % len(spec.choices)] if spec.choices else str(which + 1)
    count = int(spec.nargs) if spec.nargs.isdigit() else 1
    return Setting(value=value, origin=origin, words=(value,) * count)


@pytest.mark.parametrize(
    "flag", [flag for flag, name in BOUND.items() if KNOBS[name].kind.startswith("count")]
)
def test_a_trailing_flag_beats_its_knob_and_both_keep_what_was_overridden(
    project: Project, flag: str
) -> None:
    name = BOUND[flag]
    given = {
        "GPUS_PER_NODE": "8",
        "GBS": "64",
        "NUM_LAYERS": "8",
        name: "1" if name != "GBS" else "64",
    }
    value = {"--global-batch-size": "128", "--seq-length": "256"}.get(flag, "2")
    if name == "ETP":
        given["EP"] = "2"
    run = project.resolve(given, [flag, value])
    assert run.args[flag].value == run.knobs[name].value == value
    lost = [one.value for one in run.knobs[name].overrode if one.origin.layer == "environment"]
    assert lost == [given[name]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"VPP": "2"}, ["--num-virtual-stages-per-pipeline-rank", "4"]),
        ({"VPP": "2"}, ["--num-layers-per-virtual-pipeline-stage", "1"]),
        ({"VPP": "4", "LAYERS_PER_VP": "2"}, []),
        ({"LAYERS_PER_VP": "2", "VPP": "2"}, ["--num-virtual-stages-per-pipeline-rank", "4"]),
        ({"VPP": "4"}, ["--pipeline-model-parallel-layout", "Ett|tt|tt|ttL"]),
        ({"VPP": "2"}, ["--pipeline-model-parallel-size", "1"]),
        ({"PP_FIRST": "3"}, ["--decoder-first-pipeline-num-layers", "5"]),
        ({"PP_LAST": "3"}, ["--decoder-last-pipeline-num-layers", "5"]),
        ({"PP_FIRST": "3", "PP_LAST": "4"}, []),
        ({"PP_FIRST": "3"}, ["--pipeline-model-parallel-layout", "Etttt|ttttL"]),
        ({"DISPATCHER": "deepep", "MOE_TOKEN_DISPATCHER": "alltoall"}, []),
        (
            {},
            [
                "--num-virtual-stages-per-pipeline-rank",
                "2",
                "--num-layers-per-virtual-pipeline-stage",
                "1",
            ],
        ),
    ],
)
def test_a_knob_without_a_flag_of_its_own_never_loses_in_silence(
    project: Project, given: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(MoeBenchError):
        project.resolve(MORE | given, words)


def test_a_bad_value_of_a_trailing_flag_is_said_in_the_flags_spelling(project: Project) -> None:
    with pytest.raises(MoeBenchError, match=r"^--tensor-model-parallel-size 2 3 \(command line\)"):
        project.resolve(flags=["--tensor-model-parallel-size", "2", "3"])
    with pytest.raises(MoeBenchError, match=r"^--tensor-model-parallel-size  \(command line\)"):
        project.resolve(flags=["--tensor-model-parallel-size"])


def test_false_leaves_a_flag_of_the_yaml_out_and_a_misspelt_one_is_still_refused(
    project: Project,
) -> None:
    assert "--save-interval" not in project.resolve(flags=["--save-interval", "false"]).args
    run = project.resolve(flags=["--train-iters=false", "--train-samples", "80"])
    assert "--train-iters" not in run.args
    with pytest.raises(MoeBenchError, match="no such flag"):
        project.resolve(flags=["--save-interva", "false"])


def test_an_empty_variable_says_nothing_and_overrides_nothing(project: Project) -> None:
    project.write(COMMON, "export COMMENT=${COMMENT:-ours}\n")
    run = project.resolve({"COMMENT": ""})
    assert (run.knobs["COMMENT"].value, run.knobs["COMMENT"].overrode) == ("ours", ())
    assert run.notes == ()


def test_a_knob_of_the_environment_beats_the_yamls_own_number(project: Project) -> None:
    project.add_flags(
        "--num-virtual-stages-per-pipeline-rank: 2\n--decoder-first-pipeline-num-layers: 5"
    )
    with pytest.raises(MoeBenchError, match=r"VPP=1 \(environment\)"):
        project.resolve(MORE | {"VPP": "1", "PP_FIRST": "6"})
    run = project.resolve(MORE | {"PP_FIRST": "6"})
    assert run.args["--decoder-first-pipeline-num-layers"].value == "6"


@pytest.mark.parametrize(
    ("name", "line"),
    [("MODEL", "export MODEL=Tiny-Other"), ("CLUSTER", "CLUSTER=x"), ("DRY_RUN", "DRY_RUN=0")],
)
def test_a_conf_cannot_change_what_it_was_read_by(project: Project, name: str, line: str) -> None:
    project.write("cluster_configs/benchmarking/local.conf", line)
    with pytest.raises(
        MoeBenchError, match=rf"{name}=\S+ \(cluster_configs.*:1\) contradicts {name}="
    ):
        project.resolve({"DRY_RUN": "1"})
