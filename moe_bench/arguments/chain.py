"""DEPENDENCY=singleton: jobs of one name run one after the other, each going on from the checkpoints of the one before."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from moe_bench.config.knobs import says
from moe_bench.config.layers import EXPLICIT
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting

CHAIN_VARIABLE = "MOE_BENCH_CHAIN"
"""Tells the ranks which --save folder, outside the run's own, is theirs to go on from."""
_JOB_NAME = re.compile(r"[^A-Za-z0-9._+-]+")


def job_name(run: ResolvedRun) -> str:
    """The guide's ACCOUNT-moe-RUN_NAME, in characters that no shell and no Slurm tool reads as anything else."""
    knobs = {name: setting.value for name, setting in run.knobs.items()}
    parts = [knobs.get("ACCOUNT", ""), "moe", knobs.get("RUN_NAME") or run.model]
    return _JOB_NAME.sub("_", "-".join(part for part in parts if part))[:120]


def chained(run: ResolvedRun) -> ResolvedRun:
    """The run, saving where the next job of its name and model looks; itself without DEPENDENCY=singleton. Pure.

    A --save that the caller gave is kept, and is what the chain shares then.
    """
    knob = run.knobs.get("DEPENDENCY")
    if knob is None or "singleton" not in re.split(r"[,?]", knob.value):
        return run
    save = run.args.get("--save")
    if save is None or save.origin.layer not in EXPLICIT:
        save = _shared(run, knob, save)
    note = f"{says('DEPENDENCY', knob)}: checkpoints go to {save.value}, and the run goes on from the newest one there"
    chain = Setting(
        value=save.value, origin=Origin(layer="derived", place=says("DEPENDENCY", knob))
    )
    return replace(
        run,
        args={**run.args, "--save": save},
        env={**run.env, CHAIN_VARIABLE: chain},
        notes=(*run.notes, note),
    )


def _shared(run: ResolvedRun, knob: Setting, before: Setting | None) -> Setting:
    folder: Path = run.run_dir.parent / "chains" / f"{job_name(run)}-{run.model}"
    lost = (
        (Overridden(value=before.value, origin=before.origin), *before.overrode) if before else ()
    )
    origin = Origin(layer="derived", place=says("DEPENDENCY", knob))
    return Setting(value=str(folder), origin=origin, overrode=lost)
