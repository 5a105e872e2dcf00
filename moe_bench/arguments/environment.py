"""Variables every rank needs beside the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_bench.config.layers import Candidate
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, Setting

CARRIED = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "DEEPEP_",
    "HYBRID_EP_",
    "NCCL_",
    "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN",
    "NVLINK_DOMAIN_SIZE",
    "NVSHMEM_",
    "NVTE_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_NCCL_",
    "UCX_",
    "USE_MNNVL",
)
"""How the caller's variables begin that decide what the ranks do: recorded, checked and exported like a preset's own."""


def carried(given: Mapping[str, str]) -> Iterator[str]:
    """The caller's variables that are passed on; what an image says of itself (NCCL_VERSION) is not."""
    return (name for name in given if name.startswith(CARRIED) and not name.endswith("_VERSION"))


def threads_per_rank(machine: Machine, ranks: int) -> int:
    """Cores shared evenly, at least one: more threads than cores slow every rank down."""
    return max(machine.cores // max(ranks, 1), 1)


PASSED_ON = (
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS"),
    *("MEGATRON_PATH", "PROFILE"),
)
"""Knobs that the ranks get as variables."""


def of_run(
    run_id: str, run_dir: str, model: str, knobs: Mapping[str, Setting]
) -> Iterator[Candidate]:
    """Names the run for the rank half, and passes W&B's mode and MEGATRON_PATH on."""
    rule = Origin(layer="derived", place="moe_bench/arguments/environment.py")
    yield Candidate(name="MOE_BENCH_RUN_ID", value=run_id, origin=rule)
    yield Candidate(name="MOE_BENCH_RUN_DIR", value=run_dir, origin=rule)
    yield Candidate(name="MOE_BENCH_MODEL", value=model, origin=rule)
    for name in PASSED_ON:
        if name in knobs:
            yield Candidate(name=name, value=knobs[name].value, origin=knobs[name].origin)
    wandb_dir = Candidate(name="WANDB_DIR", value=run_dir, origin=rule)
    yield wandb_dir


def of_local(machine: Machine, ranks: int) -> Iterator[Candidate]:
    """Threads of a rank on this machine."""
    origin = Origin(layer="derived", place=f"{machine.cores} cores for {ranks} ranks")
    yield Candidate(
        name="OMP_NUM_THREADS", value=str(threads_per_rank(machine, ranks)), origin=origin
    )
