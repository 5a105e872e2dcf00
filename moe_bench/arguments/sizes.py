"""Sizes that must divide one another, said before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting
from moe_bench.topology.layout import smallest_world


def with_local_world(run: ResolvedRun, machine: Machine, given: Mapping[str, str]) -> ResolvedRun:
    """NNODES and GPUS_PER_NODE of this machine, where the caller did not say: one node, as many ranks as the layout needs."""
    world = _smallest(run)
    nodes = _local("NNODES", "1", "one machine", run, given)
    if machine.device == "cuda":
        ranks = _local("GPUS_PER_NODE", str(machine.gpus), "GPUs of this machine", run, given)
    else:
        ranks = _local(
            "GPUS_PER_NODE",
            str(max(world, _preset_ranks(run, world))),
            "smallest world of the layout",
            run,
            given,
        )
    return replace(run, knobs={**run.knobs, "NNODES": nodes, "GPUS_PER_NODE": ranks})


def _preset_ranks(run: ResolvedRun, world: int) -> int:
    knob = run.knobs.get("GPUS_PER_NODE")
    if knob is None or not run.model.startswith("Tiny-") or int(knob.value) % world:
        return world
    return int(knob.value)


def _local(
    name: str, value: str, place: str, run: ResolvedRun, given: Mapping[str, str]
) -> Setting:
    before = run.knobs.get(name)
    if before is not None and given.get(name):
        return before
    origin = Origin(layer="derived", place=place)
    lost = (
        ()
        if before is None or before.value == value
        else (Overridden(value=before.value, origin=before.origin),)
    )
    return Setting(value=value, origin=origin, overrode=lost)


def _smallest(run: ResolvedRun) -> int:
    size = {name: _size(run, flag) for name, flag in SIZE_FLAGS.items()}
    return smallest_world(**size)


SIZE_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}


def _size(run: ResolvedRun, flag: str) -> int:
    setting = run.args.get(flag)
    if setting is None:
        return _size(run, SIZE_FLAGS["tp"]) if flag == SIZE_FLAGS["etp"] else 1
    return int(setting.value)


def check(run: ResolvedRun) -> None:
    """Raises ConfigError."""
