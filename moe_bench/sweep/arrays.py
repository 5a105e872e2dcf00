"""A sweep as Slurm job arrays: one for each kind of job, since an array's elements all get the same nodes and time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_bench.config.run import ResolvedRun
from moe_bench.launch import queue, sbatch
from moe_bench.launch.directory import RUN_FILE
from moe_bench.launch.job import record_submission
from moe_bench.launch.launcher import JobHandle, LaunchPlan
from moe_bench.launch.local import SCRIPT
from moe_bench.launch.queue import QueueEntry
from moe_bench.launch.slurm import SlurmLauncher
from moe_bench.launch.status import find_failure
from moe_bench.results.state import State, standing
from moe_bench.results.sweep_record import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    LOST,
    TIMED_OUT,
    Attempt,
    Point,
    Sweep,
    write_sweep,
)
from moe_bench.results.triage import Rule
from moe_bench.sweep import cost
from moe_bench.sweep.local_queue import is_left

MOST_ELEMENTS = 1000
"""Of one array: Slurm's MaxArraySize is 1001 unless a site says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One sbatch script and the points it runs, in the order of its elements."""

    name: str
    """Of the file in the sweep's directory."""
    script: str
    points: tuple[Point, ...]


def render(
    launcher: SlurmLauncher,
    members: Sequence[tuple[Point, ResolvedRun]],
    folder: Path,
    *,
    limit: int | None,
    first_number: int = 1,
) -> list[Array]:
    """One array for each kind of job among the points, none larger than Slurm takes. Pure."""
    kinds: dict[tuple[str, ...], list[tuple[Point, ResolvedRun]]] = {}
    for member in members:
        kinds.setdefault(launcher.array_key(member[1]), []).append(member)
    chunks = [
        kind[at : at + MOST_ELEMENTS]
        for kind in kinds.values()
        for at in range(0, len(kind), MOST_ELEMENTS)
    ]
    return [
        Array(
            name=f"array-{number}.sh",
            script=launcher.render_array(
                [run for _, run in chunk], folder, name=f"sweep-{folder.name}-{number}", limit=limit
            ),
            points=tuple(point for point, _ in chunk),
        )
        for number, chunk in enumerate(chunks, start=first_number)
    ]


def submit(
    launcher: SlurmLauncher, folder: Path, sweep: Sweep, *, retry_failed: bool, limit: int | None
) -> tuple[Sweep, list[tuple[Array, str]], list[Point]]:
    """Submit what is left and fits the budget. Returns the sweep as it stands then, each array with its job, and what did not fit.

    `sweep.json` knows of an array as soon as Slurm does. Raises LaunchError; what was submitted before stays written down.
    """
    left = [one for one in sweep.points if not in_flight(one) and is_left(one, retry_failed)]
    budget = sweep.budget_node_hours
    fit, over = cost.within(left, None if budget is None else budget - sweep.node_hours)
    members = [
        (one, ResolvedRun.from_json((folder / one.name / RUN_FILE).read_bytes())) for one in fit
    ]
    number = 1 + len(list(folder.glob("array-*.sh")))
    submitted: list[tuple[Array, str]] = []
    for array in render(launcher, members, folder, limit=limit, first_number=number):
        script = folder / array.name
        script.write_text(array.script, newline="")
        job = sbatch.submit(script)
        sweep = _with_attempts(sweep, array, job)
        write_sweep(folder, sweep)
        _tell_points(folder, array, job)
        submitted.append((array, job))
    if over:
        sweep = _not_started(sweep, over)
        write_sweep(folder, sweep)
    return sweep, submitted, over


def _with_attempts(sweep: Sweep, array: Array, job: str) -> Sweep:
    now = time.time()
    elements = {point.number: index for index, point in enumerate(array.points)}

    def started(point: Point) -> Point:
        if point.number not in elements:
            return point
        attempt = Attempt(
            started_unix_s=now,
            job_id=f"{job}_{elements[point.number]}",
            node_hours=point.most_node_hours,
        )
        return replace(point, attempts=(*point.attempts, attempt), skipped=None)

    return replace(sweep, points=tuple(started(point) for point in sweep.points))


def _not_started(sweep: Sweep, over: Iterable[Point]) -> Sweep:
    numbers = {point.number for point in over}
    budget = sweep.budget_node_hours or 0.0
    why = f"of the budget of {budget:g}, {cost.shown(max(budget - sweep.node_hours, 0.0))} are left"
    points = tuple(
        replace(one, skipped=f"it may take {cost.shown(one.most_node_hours)}, and {why}")
        if one.number in numbers
        else one
        for one in sweep.points
    )
    return replace(sweep, points=points)


def _tell_points(folder: Path, array: Array, job: str) -> None:
    """So that `status`, `logs` and `cancel` know each point as a run of its own."""
    for index, point in enumerate(array.points):
        run_dir = folder / point.name
        plan = LaunchPlan(launcher="slurm", filename=SCRIPT, script=(run_dir / SCRIPT).read_text())
        record_submission(run_dir, plan, JobHandle(launcher="slurm", job_id=f"{job}_{index}"))


def in_flight(point: Point) -> bool:
    """Whether the point waits in the queue or runs, as far as is known."""
    return bool(point.attempts) and point.attempts[-1].outcome is None


def refreshed(folder: Path, sweep: Sweep, rules: Sequence[Rule]) -> Sweep:
    """What became of the points in flight, by Slurm's word and by their own files. Raises LaunchError."""
    jobs = [one.attempts[-1].job_id for one in sweep.points if in_flight(one)]
    entries = queue.query(job for job in jobs if job is not None)
    points = tuple(
        _refreshed(folder / one.name, one, entries, rules) if in_flight(one) else one
        for one in sweep.points
    )
    return replace(sweep, points=points)


def _refreshed(
    run_dir: Path, point: Point, entries: Mapping[str, QueueEntry], rules: Sequence[Rule]
) -> Point:
    *earlier, last = point.attempts
    entry = entries.get(last.job_id or "")
    if entry is not None and not entry.ended:
        return point
    outcome, why = _outcome(run_dir, entry, rules)
    hours = point.most_node_hours
    if entry is not None and entry.elapsed:
        hours = min(hours, point.nodes * _elapsed_s(entry.elapsed) / 3600)
    closed = replace(last, ended_unix_s=time.time(), outcome=outcome, why=why, node_hours=hours)
    return replace(point, attempts=(*earlier, closed))


def _outcome(
    run_dir: Path, entry: QueueEntry | None, rules: Sequence[Rule]
) -> tuple[str, str | None]:
    """By the point's files where they say that it completed, else by Slurm where it still knows the job."""
    state = standing(run_dir).state
    if state is State.COMPLETED:
        return COMPLETED, None
    if entry is not None and entry.state in ("CANCELLED", "PREEMPTED"):
        return INTERRUPTED, entry.state.lower()
    if (entry is not None and entry.state in ("TIMEOUT", "DEADLINE")) or state is State.STOPPED:
        return TIMED_OUT, "its RUN_TIME was over"
    failure = find_failure(run_dir, rules)
    if failure is not None:
        return FAILED, failure.short
    if entry is not None and entry.state != "COMPLETED":
        return FAILED, f"Slurm: {entry.state}"
    return LOST, "Slurm no longer knows the job, and its files do not tell of an end"


def _elapsed_s(text: str) -> int:
    """Of squeue's and sacct's MM:SS, HH:MM:SS or D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = 60 * total + (int(part) if part.isdigit() else 0)
    return total + 86400 * (int(days) if days.isdigit() else 0)
