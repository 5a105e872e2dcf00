"""A sweep's own directory: made once, found again by the same command, refused to another one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_bench.errors import ConfigError, LaunchError, RecordError
from moe_bench.launch import directory as run_directory
from moe_bench.launch.local import SCRIPT
from moe_bench.results.sweep_record import SWEEP_FILE, Sweep, read_sweep, write_sweep
from moe_bench.sweep.plan import SweepPlan

LOCK = ".lock"


def folder_of(plan: SweepPlan) -> Path:
    """Where the plan's points lie."""
    return plan.candidates[0].run.run_dir.parent


def described(plan: SweepPlan, *, budget_node_hours: float | None, prune_oom: bool) -> Sweep:
    """The plan as it is written down."""
    return Sweep(
        sweep_id=plan.sweep_id,
        model=plan.model,
        axes=plan.asked.axes,
        words=tuple(plan.asked.request.words),
        given=plan.asked.given,
        where=plan.asked.where,
        created_unix_s=time.time(),
        points=tuple(one.point for one in plan.candidates),
        pruned=plan.pruned,
        budget_node_hours=budget_node_hours,
        prune_oom=prune_oom,
    )


def is_there(folder: Path) -> bool:
    """Whether a sweep was made there."""
    return (folder / SWEEP_FILE).is_file()


def make(folder: Path, plan: SweepPlan, sweep: Sweep) -> None:
    """Every point's run directory, then `sweep.json`: a sweep without one was never begun. Raises LaunchError."""
    for one in plan.candidates:
        if (one.run.run_dir / SCRIPT).is_file():  # of a making that was cut short
            _refuse_other_script(one.run.run_dir / SCRIPT, one.plan.script, sweep.sweep_id)
            continue
        run_directory.create(one.run, one.plan)
    (folder / "logs").mkdir(exist_ok=True)
    write_sweep(folder, sweep)


def _refuse_other_script(path: Path, script: str, sweep_id: str) -> None:
    if path.read_text() != script:
        raise LaunchError(
            f"{path} is another script than this sweep's; remove {path.parents[1]}, or name the sweep with --id, "
            f"for example --id {sweep_id}-2"
        )


def again(folder: Path, asked: Sweep) -> Sweep:
    """The sweep that is there, going on as asked now. Raises ConfigError when it is another one."""
    there = read_sweep(folder)
    differing = _differences(there, asked)
    if differing:
        raise ConfigError(
            f"{folder} is a sweep of other arguments: {'; '.join(differing)}; go on with it as it was "
            f"(python -m moe_bench sweep --resume {there.sweep_id}), or start a new one with --id NAME"
        )
    return replace(
        there,
        budget_node_hours=asked.budget_node_hours,
        prune_oom=asked.prune_oom or there.prune_oom,
    )


def _differences(there: Sweep, asked: Sweep) -> list[str]:
    found = []
    for what in ("model", "where", "words"):
        was, now = getattr(there, what), getattr(asked, what)
        if was != now:
            found.append(f"{_NAMES[what]} {_shown(was)} then, {_shown(now)} now")
    for name in dict.fromkeys((*there.given, *asked.given)):
        was, now = there.given.get(name, "unset"), asked.given.get(name, "unset")
        if was != now:
            found.append(f"{name} {was} then, {now} now")
    if there.axes != asked.axes:
        found.append(f"--vary {_axes(there)} then, {_axes(asked)} now")
    if found:
        return found
    if len(there.points) != len(asked.points):
        return [
            f"{len(there.points)} points could run then, {len(asked.points)} can now: {_CHANGED}"
        ]
    was_scripts = {point.name: point.script_sha256 for point in there.points}
    for point in asked.points:
        if was_scripts.get(point.name) != point.script_sha256:
            return [f"point {point.number} ({point.label}) resolves to another run now: {_CHANGED}"]
    return []


_CHANGED = "a preset, a .conf, the environment or the project has changed since (or --preflight was given once only)"
_NAMES = {"model": "MODEL", "where": "run on", "words": "flags"}


def _shown(value: object) -> str:
    return " ".join(value) or "none" if isinstance(value, tuple) else str(value)


def _axes(sweep: Sweep) -> str:
    return " ".join(
        f"{','.join(axis.names)}={','.join(':'.join(one) for one in axis.values)}"
        for axis in sweep.axes
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process works on the sweep. Raises LaunchError when one does."""
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise LaunchError(
                f"{folder}: process {file.read().strip() or '?'} works on this sweep now; wait for it, or stop it with Ctrl-C there"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def required(found: Path | None, name: str, base: Path) -> Path:
    """The sweep that `--resume` names. Raises RecordError."""
    if found is None:
        raise RecordError(
            f"--resume {name}: there is no such sweep in {base / 'sweeps'}; the command that began it goes on with it, too"
        )
    return found
