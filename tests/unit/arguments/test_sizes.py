"""Sizes that do not fit are refused by name, with numbers that would."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.arguments.sizes import pipeline_of
from moe_bench.config.machine import Machine
from moe_bench.errors import ConfigError
from moe_bench.launch.local import LocalLauncher
from tests.support.projects import CPU, GPUS, Project, repository


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def refusal(project: Project, given: dict[str, str], *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        project.resolve(given, flags)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "flags", "said"),
    [
        ({"TP": "3"}, [], "does not divide the 8 ranks of NNODES=1"),
        ({"EP": "16"}, [], "EP=16 (environment) x PP=1"),
        ({"TP": "8"}, [], "TP=8 (environment) does not divide --num-attention-heads 4"),
        (
            {"EP": "3", "GPUS_PER_NODE": "3"},
            [],
            "EP=3 (environment) does not divide --num-experts 8",
        ),
        ({"EP": "3", "GPUS_PER_NODE": "3"}, [], "use one of 1, 2, 4, 8"),
        ({"GBS": "12"}, [], "GBS=12 (environment) is not a multiple of MBS=1"),
        ({"GBS": "12"}, [], "use GBS=16 or another multiple of 8"),
        ({"GBS": "8", "MBS": "2"}, [], "or MBS=1"),
        (
            {"SEQ_LEN": "130", "CP": "4"},
            [],
            "SEQ_LEN=130 (environment) must be a multiple of 2 x CP=4",
        ),
        ({"SEQ_LEN": "129", "TP": "2"}, [], "for sequence parallelism"),
        ({}, ["--moe-router-topk", "9"], "a token cannot go to more experts than there are"),
    ],
)
def test_sizes_that_do_not_divide(
    project: Project, given: dict[str, str], flags: list[str], said: str
) -> None:
    assert said in refusal(project, given, *flags)


LOWERED = "--decrease-batch-size-if-needed"


@pytest.mark.parametrize(
    ("release", "flags"),
    [("0.17", [LOWERED]), ("0.19", [LOWERED, "--eval-global-batch-size", "8"])],
)
def test_a_batch_that_megatron_itself_lowers_need_not_divide(
    project: Project, release: str, flags: list[str]
) -> None:
    given = {"GBS": "12", "MCORE_RELEASE_VERSION": release}
    assert project.resolve(given, flags).args["--global-batch-size"].value == "12"
    assert "use GBS=8" in refusal(project, given | {"GBS": "7"}, *flags)


def test_a_batch_that_megatron_lowers_for_training_alone_needs_one_for_evaluation(
    project: Project,
) -> None:
    said = refusal(project, {"GBS": "12"}, LOWERED)
    assert f"or --eval-global-batch-size 8 beside {LOWERED}" in said


def test_query_groups_and_tp(project: Project) -> None:
    project.add_flags("--group-query-attention: true\n--num-query-groups: 3")
    assert "--num-query-groups 3" in refusal(project, {})


@pytest.mark.parametrize(
    ("given", "flags", "said"),
    [
        (
            {"PP": "8", "NUM_LAYERS": "12", "GBS": "16"},
            [],
            "do not divide evenly over 8 pipeline stages",
        ),
        (
            {"PP": "4", "NUM_LAYERS": "9", "PP_FIRST": "2", "PP_LAST": "2"},
            [],
            "5 layers left do not divide evenly over the 2 other",
        ),
        ({"PP": "2", "NUM_LAYERS": "9", "PP_FIRST": "2", "PP_LAST": "2"}, [], "hold 4 of 9 layers"),
        ({"PP": "2", "VPP": "3", "NUM_LAYERS": "8"}, [], "do not divide over 3 virtual stages"),
        (
            {"PP": "2", "NUM_LAYERS": "4"},
            ["--pipeline-model-parallel-layout", "Ett|tL"],
            "holds 3 decoder layers (t), but NUM_LAYERS=4",
        ),
        (
            {"PP": "2"},
            ["--pipeline-model-parallel-layout", "Ett|t|tL"],
            "3 stages are not a multiple of PP=2",
        ),
        ({"PP": "2"}, ["--pipeline-model-parallel-layout", "Ettx|ttL"], "'x' is none of E"),
        (
            {"PP": "2", "VPP": "3"},
            ["--pipeline-model-parallel-layout", "Et|t|t|tL"],
            "VPP=3 (environment), but by --pipeline-model-parallel-layout",
        ),
        ({"LAYERS_PER_VP": "3"}, [], "and --num-layers 4 (NUM_LAYERS of"),
        (
            {"PP": "2"},
            ["--pipeline-model-parallel-layout", "Ett|ttmL"],
            "holds 1 MTP layers (m), but --mtp-num-layers is not set",
        ),
    ],
)
def test_layers_that_do_not_add_up(
    project: Project, given: dict[str, str], flags: list[str], said: str
) -> None:
    assert said in refusal(project, given, *flags)


@pytest.mark.parametrize(
    ("machine", "given", "said"),
    [
        (CPU, {}, "NNODES=2 (environment): CPU ranks are those of one machine"),
        (GPUS, {}, "NNODES=2 (environment): not set: MASTER_ADDR, NODE_RANK; on each machine"),
        (GPUS, {"MASTER_ADDR": "first"}, "NNODES=2 (environment): not set: NODE_RANK; on each"),
        (
            GPUS,
            {"MASTER_ADDR": "first", "NODE_RANK": "2"},
            "NODE_RANK=2 (environment) is none of the machines of NNODES=2 (environment): they are counted from 0 to 1",
        ),
    ],
)
def test_several_machines_without_a_scheduler(
    project: Project, machine: Machine, given: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        project.resolve({"NNODES": "2", "GBS": "16"} | given, machine=machine, local=True)
    assert said in str(caught.value)


def test_each_machine_is_told_which_it_is(project: Project) -> None:
    given = {"NNODES": "2", "GBS": "16", "MASTER_ADDR": "first", "NODE_RANK": "1"}
    run = project.resolve(given, machine=GPUS, local=True)
    assert run.world_size == 16
    script = LocalLauncher(project=project.root, python="python", device="cuda").render(run).script
    assert "--nnodes 2 --master-addr first --master-port 6000 --node-rank 1" in script


def test_no_mtp_layers_is_a_number_of_layers(project: Project) -> None:
    run = project.resolve({"PP": "2", "NUM_LAYERS": "4"}, ["--mtp-num-layers", "0"])
    assert sum(stage.mtp_layers for stage in pipeline_of(run).stages) == 0
    layout = ["--pipeline-model-parallel-layout", "Ett|ttL", "--mtp-num-layers", "0"]
    assert project.resolve({"PP": "2", "NUM_LAYERS": "4"}, layout).args


def test_the_message_shows_the_stages(project: Project) -> None:
    said = refusal(project, {"PP": "4", "NUM_LAYERS": "10"})
    assert "stage 0: 2 layers" in said
    assert "sum: 8 of 10 layers" in said


def test_uneven_stages_hold_what_was_asked(project: Project) -> None:
    run = project.resolve({"PP": "4", "NUM_LAYERS": "9", "PP_FIRST": "2", "PP_LAST": "1"})
    stages = pipeline_of(run)
    assert [len(stages.layers_of_rank(rank)) for rank in range(4)] == [2, 3, 3, 1]


TINY = ("Tiny-Qwen3", "Tiny-Mixtral", "Tiny-DeepSeek-V3")
ONE_GPU = Machine(device="cuda", gpus=1, cores=8)


@pytest.mark.parametrize("model", TINY)
def test_a_tiny_preset_trains_on_one_gpu_and_says_what_it_gave_up(model: str) -> None:
    run = repository().resolve({"MODEL": model}, ["--mock-data"], machine=ONE_GPU, local=True)
    assert run.world_size == 1
    assert run.knobs["EP"].value == run.args["--expert-model-parallel-size"].value == "1"
    assert [(one.used, one.reason) for one in run.substitutions] == [
        ("EP=1", "this machine has 1 GPU")
    ]


@pytest.mark.parametrize("model", TINY)
def test_a_tiny_preset_keeps_its_layout_on_many_gpus_and_says_how_many_it_uses(model: str) -> None:
    run = repository().resolve({"MODEL": model}, ["--mock-data"], machine=GPUS, local=True)
    assert (run.world_size, run.knobs["EP"].value, run.substitutions) == (2, "2", ())
    (note,) = (note for note in run.notes if "GPUs are used" in note)
    assert note.startswith("2 of this machine's 8 GPUs")


def test_an_ep_that_the_user_gave_is_not_lowered_to_fit_one_gpu() -> None:
    with pytest.raises(ConfigError, match=r"EP=2 \(environment\)"):
        repository().resolve(
            {"MODEL": "Tiny-Qwen3", "EP": "2"}, ["--mock-data"], machine=ONE_GPU, local=True
        )


def test_a_model_for_gpus_gets_all_of_them() -> None:
    given = {"MODEL": "Qwen3-30B-A3B"}
    run = repository().resolve(given, ["--mock-data"], machine=GPUS, local=True)
    assert run.world_size == 8


def test_a_rehearsal_that_needs_more_gpus_than_there_are_names_the_ways_out() -> None:
    given = {"MODEL": "DeepSeek-V3", "REHEARSE": "1"}
    with pytest.raises(ConfigError, match="REHEARSE_RANKS=1, or MOE_BENCH_DEVICE=cpu"):
        repository().resolve(given, ["--mock-data"], machine=ONE_GPU, local=True)
    run = repository().resolve(given, ["--mock-data"], machine=GPUS, local=True)
    assert run.world_size == 4


@pytest.mark.parametrize(("device", "is_bf16"), [("cpu", False), ("cuda", True), (None, False)])
def test_a_tiny_presets_precision_is_its_devices(device: str | None, is_bf16: bool) -> None:
    run = repository().resolve({"MODEL": "Tiny-Qwen3"}, ["--mock-data"], device=device)
    assert ("--bf16" in run.args) == is_bf16
    asked = repository().resolve({"MODEL": "Tiny-Qwen3", "PR": "fp32"}, device=device)
    assert "--bf16" not in asked.args


LAYERS = {"NUM_LAYERS": "8", "PP": "2", "GBS": "16"}


@pytest.mark.parametrize(
    ("given", "said", "way"),
    [
        (
            {"PP_FIRST": "5", "PP_LAST": "5"},
            "PP_FIRST=5 (environment), PP_LAST=5 (environment)",
            "PP_FIRST and PP_LAST that leave",
        ),
        ({"VPP": "3"}, "VPP=3 (environment)", "use VPP one of 1, 2, 4"),
        (
            {"PP": "3", "GPUS_PER_NODE": "3", "GBS": "9"},
            "PP=3 (environment)",
            "use PP one of 1, 2, 4, 8",
        ),
    ],
)
def test_stages_that_do_not_divide_are_said_in_knobs_with_a_way_that_works(
    tmp_path: Path, given: dict[str, str], said: str, way: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Project(tmp_path).resolve(LAYERS | given)
    assert said in str(error.value)
    assert way in str(error.value)


def test_more_ranks_than_a_cpu_starts_are_refused_by_the_knob_that_asks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"GPUS_PER_NODE=65 \(environment\) is more than the 64"):
        Project(tmp_path).resolve({"GPUS_PER_NODE": "65"}, machine=CPU, local=True)
