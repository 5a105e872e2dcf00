"""What a CPU rank cannot do, refused before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_bench.errors import ArgumentsError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A flag, which of its values are refused, and why."""

    flag: str
    refuses: Callable[[str], bool]
    reason: str
    way_out: str


def _always(_value: str) -> bool:
    return True


def _other_than(*allowed: str) -> Callable[[str], bool]:
    return lambda value: value not in allowed


_BF16 = "use --bf16, or leave the precision to fp32"
_GRAPHS = "leave it out: a CUDA graph changes how kernels are launched, not what they compute"
_LEAVE = "leave it out"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("--fp8-format", _always, "FP8 GEMMs need a GPU of the Hopper generation", _BF16),
    Refusal("--fp8", _always, "FP8 GEMMs need a GPU of the Hopper generation", _BF16),
    Refusal("--fp4-format", _always, "FP4 GEMMs need a GPU of the Blackwell generation", _BF16),
    Refusal(
        "--moe-token-dispatcher-type",
        _other_than("alltoall", "allgather", "alltoall_seq"),
        "DeepEP and HybridEP are GPU kernels",
        "use --moe-token-dispatcher-type alltoall, which sends the same tokens",
    ),
    Refusal("--moe-enable-deepep", _always, "DeepEP is a GPU library", _LEAVE),
    Refusal("--moe-permute-fusion", _always, "it is a Transformer Engine kernel", _LEAVE),
    Refusal("--moe-router-fusion", _always, "it is a Transformer Engine kernel", _LEAVE),
    Refusal("--enable-cuda-graph", _always, "there is no CUDA graph on a CPU", _GRAPHS),
    Refusal("--external-cuda-graph", _always, "there is no CUDA graph on a CPU", _GRAPHS),
    Refusal("--cuda-graph-impl", _other_than("none"), "there is no CUDA graph", _GRAPHS),
    Refusal("--optimizer-cuda-graph", _always, "there is no CUDA graph on a CPU", _GRAPHS),
    Refusal("--tp-comm-overlap", _always, "it needs user buffers of NVLink", _LEAVE),
    Refusal("--use-nccl-ub", _always, "gloo has no user buffers", _LEAVE),
    Refusal("--nccl-ub", _always, "gloo has no user buffers", _LEAVE),
    Refusal("--use-flash-attn", _always, "flash attention is a GPU kernel", _LEAVE),
    Refusal("--optimizer-cpu-offload", _always, "the optimizer is on the CPU already", _LEAVE),
    Refusal(
        "--async-save",
        _always,
        "the process that writes takes tensors off a GPU",
        _LEAVE,
    ),
    Refusal("--te-rng-tracker", _always, "it is a Transformer Engine class", _LEAVE),
    Refusal(
        "--distributed-backend",
        _other_than("gloo"),
        "NCCL connects GPUs",
        "use --distributed-backend gloo",
    ),
    Refusal(
        "--record-memory-history",
        _always,
        "it is the GPU allocator's history",
        "use PROFILE=memory, which records the resident set",
    ),
)
"""Flags of Megatron 0.11 to 0.19."""


def refuse(argv: Sequence[str]) -> None:
    """Raise ArgumentsError naming every flag of `argv` that a CPU cannot honour."""
    found = [
        f"{' '.join(asked)}: cannot work on a CPU, since {refusal.reason}; {refusal.way_out}"
        for refusal in REFUSALS
        if (asked := _asked(refusal, argv))
    ]
    if found:
        raise ArgumentsError("\n".join(found))


def _asked(refusal: Refusal, argv: Sequence[str]) -> tuple[str, ...]:
    for position, token in enumerate(argv):
        flag, joined, value = token.partition("=")
        if flag != refusal.flag:
            continue
        if not joined:
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            value = "" if following.startswith("--") else following
        if refusal.refuses(value):
            return (flag, value) if value else (flag,)
    return ()
