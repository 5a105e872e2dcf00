"""What each node of an allocation says of itself: its clock, its space, and which paths it does not have."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANSWER_TIMEOUT_S = 60
_OUTER = frozenset({"SLURM_LABELIO", "SLURM_STDINMODE", "SLURM_STDOUTMODE", "SLURM_STDERRMODE"})

_PROBE = """
printf '%s\\tclock\\t%s\\n' "$SLURMD_NODENAME" "$(date +%s.%N)"
printf '%s\\tspace\\t%s\\n' "$SLURMD_NODENAME" "$(df --output=avail -B1 /tmp | tail -n 1)"
for path in "$@"; do
  [[ -e "$path" || -e "$path.idx" ]] || printf '%s\\tmissing\\t%s\\n' "$SLURMD_NODENAME" "$path"
done
"""
"""A dataset is named by its prefix: PREFIX.bin and PREFIX.idx."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node's answer."""

    name: str
    clock_off_s: float
    """How far its clock is off from this one's, at least; 0.0 where the difference is within the time of asking."""
    free_bytes: int
    """Of /tmp, where compiled kernels and caches go."""
    missing: tuple[str, ...]
    """Those of the paths asked for that it does not have."""


def is_in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether this process runs within a Slurm job, so that srun reaches the job's nodes."""
    return "SLURM_JOB_ID" in environment


def ask(paths: Sequence[str]) -> list[Node] | str:
    """Every node's answer, by name; or what srun said when it failed."""
    # Within a step, that step's own srun has left its output options in the environment.
    environment = {name: value for name, value in os.environ.items() if name not in _OUTER}
    command = ["srun", "--overlap", "--ntasks-per-node=1", "--mpi=none", "--cpu-bind=none"]
    asked_s = time.time()
    try:
        done = subprocess.run(
            [*command, "bash", "-c", _PROBE, "probe", *paths],
            check=False, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except FileNotFoundError:
        return "srun is not on PATH"
    except subprocess.TimeoutExpired:
        return f"srun did not answer within {ANSWER_TIMEOUT_S} s"
    answered_s = time.time()
    if done.returncode != 0:
        return done.stderr.strip() or f"srun ended with {done.returncode}"
    return read(done.stdout, asked_s=asked_s, answered_s=answered_s)


def read(text: str, *, asked_s: float, answered_s: float) -> list[Node]:
    """From what the probe printed on all nodes between the two times."""
    facts: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        name, kind, value = line.split("\t", 2)
        facts.setdefault(name, {}).setdefault(kind, []).append(value)
    return [
        Node(
            name=name,
            clock_off_s=_outside(float(said["clock"][0]), asked_s, answered_s),
            free_bytes=int(said["space"][0]),
            missing=tuple(said.get("missing", ())),
        )
        for name, said in sorted(facts.items())
    ]


def _outside(time_s: float, begin_s: float, end_s: float) -> float:
    """How far a time lies before or after a span."""
    return max(begin_s - time_s, time_s - end_s, 0.0)
