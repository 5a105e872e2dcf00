"""A checkpoint that a run starts from must be there: Megatron by itself would train from scratch instead. Pure."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from moe_bench.config.run import Origin, ResolvedRun, Setting

_DEMAND = "--exit-on-missing-checkpoint"


def starts_from(run: ResolvedRun) -> Setting | None:
    """--load, where the run cannot begin without it.

    With the folder of --save it means "go on, if there is anything"; with --pretrained-checkpoint that is what is loaded
    else, and Megatron itself insists on it; and it alone knows where --non-persistent-ckpt-type keeps its own.
    """
    load, save = run.args.get("--load"), run.args.get("--save")
    others = ("--pretrained-checkpoint", "--non-persistent-ckpt-type")
    if load is None or any(flag in run.args for flag in others):
        return None
    if save is not None and os.path.normpath(save.value) == os.path.normpath(load.value):
        return None
    return load


def demanded(run: ResolvedRun, knows: Callable[[str], bool]) -> ResolvedRun:
    """The run, ended by Megatron before the first step where that checkpoint is missing."""
    load = starts_from(run)
    if load is None or _DEMAND in run.args or not knows(_DEMAND):
        return run
    origin = Origin(layer="derived", place=f"{load.spelled('--load')} ({load.origin.place})")
    return replace(run, args={**run.args, _DEMAND: Setting(value="true", origin=origin)})
