"""What a machine without CUDA gets instead, said aloud. Pure."""

from __future__ import annotations

from dataclasses import replace

from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution
from moe_bench.errors import ConfigError


def for_machine(run: ResolvedRun, machine: Machine, *, asked: str | None) -> ResolvedRun:
    """The run as this machine can do it; unchanged where there is CUDA."""
    if machine.device == "cuda":
        return run
    args = dict(run.args)
    for flag, value in (
        ("--distributed-backend", "gloo"),
        ("--use-cpu-initialization", "true"),
        ("--transformer-impl", "local"),
    ):
        before = args.get(flag)
        lost = (
            ()
            if before is None or before.value == value
            else (Overridden(value=before.value, origin=before.origin),)
        )
        args[flag] = Setting(
            value=value,
            origin=Origin(layer="derived", place="rule of a machine without CUDA"),
            overrode=lost,
        )
    for flag in (
        "--no-masked-softmax-fusion",
        "--no-bias-swiglu-fusion",
        "--no-bias-dropout-fusion",
        "--no-rope-fusion",
        "--no-gradient-accumulation-fusion",
        "--no-persist-layer-norm",
    ):
        args.setdefault(
            flag,
            Setting(
                value="true", origin=Origin(layer="derived", place="rule of a machine without CUDA")
            ),
        )
    return replace(run, args=args)
