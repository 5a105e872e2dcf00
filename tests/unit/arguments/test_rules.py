"""Each derived choice, and when it is not derived."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.gather import RUNTIME
from moe_bench.errors import ConfigError
from tests.support.projects import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def values(project: Project, given: dict[str, str], *flags: str) -> dict[str, str]:
    return {name: setting.value for name, setting in project.resolve(given, flags).args.items()}


def test_bf16_derives_no_flags(project: Project) -> None:
    assert values(project, {"PR": "bf16"}) == values(project, {})


def test_fp8_is_block_wise_with_low_precision_states(project: Project) -> None:
    project.add_flags("--use-distributed-optimizer: true\n--transformer-impl: transformer_engine")
    found = values(project, {"PR": "fp8"})
    assert (found["--fp8-recipe"], found["--fp8-format"]) == ("blockwise", "e4m3")
    assert {
        "--fp8-param-gather",
        "--use-precision-aware-optimizer",
        "--moe-router-padding-for-quantization",
    } <= found.keys()
    assert found["--exp-avg-dtype"] == "bf16"


def test_offloaded_optimizers_do_not_gather_fp8_parameters(project: Project) -> None:
    project.add_flags("--use-distributed-optimizer: true")
    found = values(project, {"PR": "fp8", "OPTIMIZER_OFFLOAD": "1"})
    assert "--fp8-param-gather" not in found
    assert "--optimizer-cpu-offload" in found


def test_mxfp8_reuses_the_gradient_buffer(project: Project) -> None:
    project.add_flags("--use-distributed-optimizer: true")
    found = values(project, {"PR": "mxfp8"})
    assert found["--fp8-recipe"] == "mxfp8"
    assert {
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
    } <= found.keys()


def test_an_old_release_gets_the_flags_it_has(project: Project) -> None:
    project.add_flags("--use-distributed-optimizer: true")
    found = values(project, {"PR": "fp8", "MCORE_RELEASE_VERSION": "0.11.0"})
    assert "--exp-avg-dtype" not in found
    assert "--fp8-recipe" not in found
    assert found["--fp8-format"] == "hybrid"


def test_fp32_takes_bf16_out(project: Project) -> None:
    assert "--bf16" not in values(project, {"PR": "fp32"})


@pytest.mark.parametrize(
    ("given", "kind", "backend"),
    [
        ({"DISPATCHER": "alltoall"}, "alltoall", None),
        ({"DISPATCHER": "deepep"}, "flex", "deepep"),
        ({"DISPATCHER": "hybridep"}, "flex", "hybridep"),
        ({"MOE_TOKEN_DISPATCHER": "flex"}, "flex", "deepep"),
        ({"MOE_TOKEN_DISPATCHER": "deepep"}, "flex", "deepep"),
        ({"MOE_TOKEN_DISPATCHER": "flex", "DISPATCHER": "hybridep"}, "flex", "hybridep"),
        ({"MOE_TOKEN_DISPATCHER": "allgather"}, "allgather", None),
    ],
)
def test_the_two_spellings_of_the_dispatcher(
    project: Project, given: dict[str, str], kind: str, backend: str | None
) -> None:
    found = values(project, {"EP": "2"} | given, "--moe-router-dtype", "fp32")
    assert found["--moe-token-dispatcher-type"] == kind
    assert found.get("--moe-flex-dispatcher-backend") == backend
    assert ("--moe-hybridep-num-sms" in found) == (backend == "hybridep")


def test_two_spellings_set_differently_are_refused(project: Project) -> None:
    with pytest.raises(ConfigError, match="are two spellings of one choice and differ"):
        project.resolve({"DISPATCHER": "deepep", "MOE_TOKEN_DISPATCHER": "alltoall"})


def test_the_one_the_caller_set_beats_the_tables_other_spelling(project: Project) -> None:
    project.write(
        RUNTIME, "export DISPATCHER=${DISPATCHER:-deepep}\n" + (project.root / RUNTIME).read_text()
    )
    assert (
        values(project, {"MOE_TOKEN_DISPATCHER": "alltoall"})["--moe-token-dispatcher-type"]
        == "alltoall"
    )


def test_releases_before_backends_take_the_deepep_switch(project: Project) -> None:
    given = {"EP": "2", "DISPATCHER": "deepep", "MCORE_RELEASE_VERSION": "0.12"}
    found = values(project, given, "--moe-router-dtype", "fp32")
    assert found["--moe-enable-deepep"] == "true"
    with pytest.raises(ConfigError, match="use DISPATCHER=deepep or a newer release"):
        project.resolve({"DISPATCHER": "hybridep", "MCORE_RELEASE_VERSION": "0.12"})


VIRTUAL, PER_VIRTUAL = (
    "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage",
)


def test_vpp_counts_virtual_stages(project: Project) -> None:
    found = values(project, {"PP": "2", "VPP": "2", "NUM_LAYERS": "8"})
    assert found[VIRTUAL] == "2"
    assert PER_VIRTUAL not in found


def test_layers_per_vp_asked_for_is_what_is_passed(project: Project) -> None:
    found = values(project, {"PP": "2", "VPP": "2", "NUM_LAYERS": "8", "LAYERS_PER_VP": "2"})
    assert found[PER_VIRTUAL] == "2"
    assert VIRTUAL not in found


def test_a_layout_string_says_it_all(project: Project) -> None:
    project.write(RUNTIME, (project.root / RUNTIME).read_text() + "export PP_FIRST=3\n")
    found = values(
        project, {"PP": "2", "VPP": "2"}, "--pipeline-model-parallel-layout", "Et|t|t|tL"
    )
    assert VIRTUAL not in found
    assert "--decoder-first-pipeline-num-layers" not in found


def test_uneven_stages_count_virtual_stages_though_the_yaml_counts_layers(project: Project) -> None:
    project.write(
        RUNTIME,
        (project.root / RUNTIME).read_text() + "export LAYERS_PER_VP=1 PP_FIRST=2 PP_LAST=2\n",
    )
    project.add_flags("--num-layers-per-virtual-pipeline-stage: ${LAYERS_PER_VP}")
    found = values(project, {"PP": "4", "VPP": "2", "NUM_LAYERS": "12"})
    assert found[VIRTUAL] == "2"
    assert PER_VIRTUAL not in found


def test_false_first_and_last_stages_are_none(project: Project) -> None:
    found = values(project, {"PP_FIRST": "false", "PP_LAST": "false", "PP": "2"})
    assert "--decoder-first-pipeline-num-layers" not in found


def test_long_sequences_raise_the_positions(project: Project) -> None:
    assert values(project, {"SEQ_LEN": "8192"})["--max-position-embeddings"] == "8192"
    assert values(project, {"SEQ_LEN": "1024"})["--max-position-embeddings"] == "4096"
    with pytest.raises(ConfigError, match=r"--max-position-embeddings 64 .* is smaller than"):
        project.resolve({}, ["--max-position-embeddings", "64"])


def test_a_short_run_does_not_warm_up_for_ever(project: Project) -> None:
    project.add_flags("--lr-warmup-iters: 100")
    assert values(project, {"TRAIN_ITERS": "20"})["--lr-warmup-iters"] == "2"
    assert values(project, {"TRAIN_ITERS": "200"})["--lr-warmup-iters"] == "100"


@pytest.mark.parametrize("profile", ["1", "nsys", "torch", "memory"])
def test_each_profile_asks_for_its_own_flags(project: Project, profile: str) -> None:
    found = values(project, {"PROFILE": profile, "TRAIN_ITERS": "50"})
    assert ("--profile" in found) == (profile != "memory")
    assert ("--use-pytorch-profiler" in found) == (profile == "torch")
    assert ("--record-memory-history" in found) == (profile == "memory")
    if profile != "memory":
        assert (found["--profile-step-start"], found["--profile-step-end"]) == ("23", "25")


def test_a_profile_of_a_short_run_lies_within_it(project: Project) -> None:
    found = values(project, {"PROFILE": "torch", "TRAIN_ITERS": "10"})
    assert (found["--profile-step-start"], found["--profile-step-end"]) == ("8", "10")


def test_expert_overlap_sets_its_streams(project: Project) -> None:
    env = project.resolve({"A2A_OVERLAP": "1", "EP": "2"}).env
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"].value == "32"
    assert project.resolve().env["CUDA_DEVICE_MAX_CONNECTIONS"].value == "1"


def test_the_callers_own_streams_beat_the_rule(project: Project) -> None:
    env = project.resolve({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}).env
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"].value == "8"


def test_gb200_joins_72_gpus(project: Project) -> None:
    project.write(
        RUNTIME,
        (project.root / RUNTIME)
        .read_text()
        .replace("export GPUS_PER_NODE=${GPUS_PER_NODE:-8}\n", ""),
    )
    run = project.resolve({"GB200_CLUSTER": "1"})
    assert (run.env["NVLINK_DOMAIN_SIZE"].value, run.knobs["GPUS_PER_NODE"].value) == ("72", "4")
    assert project.resolve().knobs["GPUS_PER_NODE"].value == "8"
