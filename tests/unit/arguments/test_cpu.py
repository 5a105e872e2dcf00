"""What a machine lacks is replaced aloud, or refused."""

from __future__ import annotations

import pytest

from moe_bench.arguments import cpu
from moe_bench.config.machine import Machine
from moe_bench.errors import ConfigError
from tests.support.projects import CPU, GPUS, repository
from tests.support.runs import make_run


def test_a_gpu_without_transformer_engine_gets_plain_layers_and_says_so() -> None:
    asked = {
        "--num-layers": "2",
        "--transformer-impl": "transformer_engine",
        "--moe-permute-fusion": "true",
    }
    machine = Machine(device="cuda", gpus=1, cores=2, transformer_engine=False)
    run = cpu.for_machine(make_run(args=asked), machine, asked=None, knows=lambda _: True)
    assert run.args["--transformer-impl"].value == "local"
    assert "--moe-permute-fusion" not in run.args
    assert "--distributed-backend" not in run.args
    assert {one.used for one in run.substitutions} == {"local", "the same operations, unfused"}


def test_a_gpu_without_apex_accumulates_gradients_outside_the_gemm_and_says_so() -> None:
    machine = Machine(device="cuda", gpus=1, cores=2, apex=False)
    run = cpu.for_machine(make_run(args={}), machine, asked=None, knows=lambda _: True)
    assert run.args["--no-gradient-accumulation-fusion"].value == "true"
    assert ["Apex" in one.reason for one in run.substitutions] == [True]
    asked = make_run(args={"--no-gradient-accumulation-fusion": "true"})
    told = cpu.for_machine(asked, machine, asked=None, knows=lambda _: True)
    assert told.substitutions == ()


def test_a_gpu_with_transformer_engine_runs_what_was_asked() -> None:
    run = make_run(args={"--transformer-impl": "transformer_engine"})
    machine = Machine(device="cuda", gpus=1, cores=2, transformer_engine=True)
    assert cpu.for_machine(run, machine, asked=None, knows=lambda _: True) == run


@pytest.mark.parametrize(
    ("asked", "kind"), [("1", "torch"), ("torch", "torch"), ("memory", "memory")]
)
def test_each_profile_has_its_profiler_on_a_cpu_and_says_what_it_is(asked: str, kind: str) -> None:
    given = {"MODEL": "Tiny-Mixtral", "PROFILE": asked, "TRAIN_ITERS": "6"}
    run = repository().resolve(given, ["--mock-data"], machine=CPU, local=True)
    assert run.env["MOE_BENCH_PROFILE"].value == kind
    assert not {"--profile", "--use-pytorch-profiler", "--record-memory-history"} & run.args.keys()
    said = [one.asked for one in run.substitutions if "PROFILE" in one.asked]
    assert bool(said) == (asked != "torch")
    if kind == "torch":
        steps = [run.args[f"--profile-step-{end}"].value for end in ("start", "end")]
        assert steps == ["4", "6"]


NO_NSYS = Machine(device="cuda", gpus=2, cores=2, nsys=False)


@pytest.mark.parametrize(
    ("machine", "lacks"), [(CPU, "there is no CUDA to trace"), (NO_NSYS, "nsys is not on PATH")]
)
def test_nsys_by_its_name_is_refused_where_it_cannot_be(machine: Machine, lacks: str) -> None:
    given = {"MODEL": "Tiny-Mixtral", "PROFILE": "nsys"}
    with pytest.raises(ConfigError, match=rf"PROFILE=nsys \(environment\): {lacks}.*PROFILE=torch"):
        repository().resolve(given, ["--mock-data"], machine=machine, local=True)


def test_a_rehearsal_of_nsys_profiles_with_torch_and_says_so() -> None:
    given = {"MODEL": "DeepSeek-V3", "PROFILE": "nsys", "REHEARSE": "1"}
    run = repository().resolve(given, ["--mock-data"], machine=CPU, local=True)
    assert run.env["MOE_BENCH_PROFILE"].value == "torch"
    assert "Nsight Systems (PROFILE=nsys)" in [one.asked for one in run.substitutions]


def test_a_gpu_machine_without_nsys_profiles_with_torch_and_says_so() -> None:
    machine = NO_NSYS
    given = {"MODEL": "Tiny-Mixtral", "PROFILE": "1"}
    run = repository().resolve(given, ["--mock-data"], machine=machine, local=True)
    assert {"--profile", "--use-pytorch-profiler"} <= run.args.keys()
    assert [one.used for one in run.substitutions] == ["PyTorch's profiler"]


def test_a_gpu_without_transformer_engine_is_told_what_it_lacks_not_what_a_cpu_does() -> None:
    asked = {"--fp8-format": "e4m3", "--tp-comm-overlap": "true", "--moe-router-fusion": "true"}
    machine = Machine(device="cuda", gpus=1, cores=2, transformer_engine=False)
    run = cpu.for_machine(make_run(args=asked), machine, asked=None, knows=lambda _: True)
    assert not run.args.keys() & asked.keys()
    reasons = {one.reason for one in run.substitutions}
    assert reasons == {"Transformer Engine is not installed here"}


def test_a_gpu_profiles_with_megatrons_own_flags() -> None:
    given = {"MODEL": "Tiny-Mixtral", "PROFILE": "torch"}
    run = repository().resolve(given, ["--mock-data"], machine=GPUS, local=True)
    assert "MOE_BENCH_PROFILE" not in run.env
    assert {"--profile", "--use-pytorch-profiler"} <= run.args.keys()
