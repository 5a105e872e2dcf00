"""What every launcher does: render (pure) and submit (the edge)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from moe_bench.config.run import ResolvedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Exactly what will be submitted."""

    launcher: str
    """local, slurm, kubernetes, ..."""
    filename: str
    """Name of the script within the run directory, e.g. `launch.sh`."""
    script: str
    """The very text that is stored, shown by DRY_RUN=1, and run."""
    environment: Mapping[str, str]
    """Non-secret variables the script expects from its caller."""

    @property
    def sha256(self) -> str:
        """Of the script's bytes; stored with the run and printed by a dry run."""
        return hashlib.sha256(self.script.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobHandle:
    """What was started."""

    launcher: str
    job_id: str
    """Slurm job id, Kubernetes object name, or the local process id."""


class Launcher(Protocol):
    """A place runs go to. Users add one by implementing this and naming it in `moe_bench.launchers` entry points."""

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """Pure: the same run gives the same bytes."""
        ...

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Start the plan. Raises LaunchError."""
        ...
