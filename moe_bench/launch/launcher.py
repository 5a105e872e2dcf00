"""What every launcher does: render (pure), submit, query and cancel (the edge)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from moe_bench.config.run import ResolvedRun


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Exactly what will be submitted."""

    launcher: str
    """local, slurm, kubernetes, ...: the name under which `status` and `cancel` find the launcher again."""
    filename: str
    """Name of the script within the run directory, e.g. `launch.sh`."""
    script: str
    """The very text that is stored, shown by DRY_RUN=1, and run."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Non-secret variables the script expects from its caller."""
    notes: tuple[str, ...] = ()
    """What the user should know and did not ask: knobs that mean nothing there, ..."""

    @property
    def sha256(self) -> str:
        """Of the script's bytes; stored with the run and printed by a dry run."""
        import hashlib  # noqa: PLC0415 - only for what is submitted or printed

        return hashlib.sha256(self.script.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class JobHandle:
    """What was started."""

    launcher: str
    job_id: str
    """Slurm job id, Kubernetes object name, or the local process id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """One job as its scheduler sees it, for launchers whose scheduler has no words of its own."""

    job_id: str
    state: str
    """PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, PREEMPTED, OUT_OF_MEMORY or CANCELLED."""
    reason: str = "None"
    """Why, in plain words; "None" when there is nothing to say."""
    nodes: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job is over for good."""
        return self.state not in ("PENDING", "RUNNING")

    @property
    def explanation(self) -> str:
        """The reason itself."""
        return self.reason


class AnyJobState(Protocol):
    """What `status` reads of a job: a JobState, or Slurm's own entry."""

    @property
    def state(self) -> str:
        """One of `JobState.state`'s words."""
        ...

    @property
    def reason(self) -> str:
        """Why; "None" when there is nothing to say."""
        ...

    @property
    def nodes(self) -> str:
        """Where."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the job is over for good."""
        ...

    @property
    def explanation(self) -> str:
        """The reason in plain words."""
        ...


@runtime_checkable
class Launcher(Protocol):
    """A place runs go to. `moe_bench.launch.registry` says how users add one."""

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """Pure: the same run gives the same bytes."""
        ...

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Start the plan, whose script stands in the run's directory. Raises LaunchError."""
        ...

    def query(self, job_ids: Iterable[str]) -> Mapping[str, AnyJobState]:
        """Those of the jobs that the scheduler still knows. Raises LaunchError when it does not answer."""
        ...

    def cancel(self, job_id: str) -> None:
        """Stop a job. Raises LaunchError."""
        ...


METHODS = ("render", "submit", "query", "cancel")
"""What a launcher must have."""
