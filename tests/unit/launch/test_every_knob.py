"""Every knob of the caller changes what would run, is refused, or is said to do nothing: on this machine, Slurm and Kubernetes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_bench.config.knobs import KNOBS, Knob
from moe_bench.errors import MoeBenchError
from moe_bench.launch import registry
from tests.support.projects import CPU, GPUS, REPOSITORY, repository

BASE = {"MODEL": "Tiny-Qwen3", "DATA_PATH": "/data/text", "GPUS_PER_NODE": "4", "GBS": "48"}
GIVEN = {
    "local": BASE,
    "slurm": BASE | {"CLUSTER": "local", "NNODES": "1"},
    "kubernetes": BASE
    | {"CLUSTER": "local", "NNODES": "1", "CONTAINER_IMAGE": "image"}
    | {"K8S_VOLUMES": "pvc:claim:/runs,pvc:data:/data"},
}
VALUES = {
    "count": ("2", "3"),
    "number": ("3",),
    "count_or_false": ("3",),
    "switch": ("0", "1"),
    "duration": ("00:07:00",),
    "text": ("zzz",),
}
ELSEWHERE = {
    "DRY_RUN": "the command line's",
    "RUN_ID": "the command line's",
    "LAUNCHER": "the command line's",
    "DATASET": "a name in the cluster's .conf; where it leads to no data it is refused (test_resolve.py)",
    "COMMENT": "read by the ranks, from run.json",
}
OF_SEVERAL_MACHINES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""A shell may hold them for another program; with NNODES above 1 they count (test_sizes.py)."""


def outcome(launcher: str, more: dict[str, str]) -> str:
    """All that the caller is told and that would run."""
    is_local = launcher == "local"
    try:
        run = repository().resolve(
            {"OUTPUT_PATH": "/runs"} | GIVEN[launcher] | more,
            machine=CPU if is_local else GPUS,
            local=is_local,
            demo_prefix=Path("/corpus/demo") if is_local else None,
            must_name=not is_local,
        )
        plan = registry.load(launcher, project=REPOSITORY, python=sys.executable).render(run)
    except MoeBenchError as error:
        return f"refused: {error}"
    notes = (*plan.notes, *run.notes)
    return repr((plan.script, notes, [one.asked for one in run.substitutions]))


CASES = [
    pytest.param(launcher, knob, id=f"{launcher}-{knob.name}")
    for launcher in GIVEN
    for knob in KNOBS.values()
    if knob.name not in ELSEWHERE and not (launcher == "local" and knob.name in OF_SEVERAL_MACHINES)
]


@pytest.mark.parametrize(("launcher", "knob"), CASES)
def test_no_knob_is_passed_over_in_silence(launcher: str, knob: Knob) -> None:
    before = outcome(launcher, {})
    assert not before.startswith("refused"), before
    values = knob.choices or VALUES[knob.kind]
    after = {outcome(launcher, {knob.name: value}) for value in values}
    assert after != {before}
