"""A sweep on disk: `sweep.json` in its own directory, `<runs>/sweeps/<id>`, beside the run directory of each point.

The file is written aside and moved into place, by one process at a time. The points' own records say what they measured.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError
from moe_bench.results.manifest import run_dirs

SWEEP_FILE = "sweep.json"
SWEEPS_FOLDER = "sweeps"
FORMAT_VERSION = 1

COMPLETED = "completed"
FAILED = "failed"
TIMED_OUT = "timed out"
"""Asked to stop shortly before its RUN_TIME was over, or ended by the scheduler's limit."""
INTERRUPTED = "interrupted"
LOST = "lost"
"""The process that watched it died without a word, and it with it."""
ENDED_BADLY = frozenset({FAILED, TIMED_OUT})
"""Started again only when asked to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One thing that varies; several names vary together."""

    names: tuple[str, ...]
    """Knobs and --flags."""
    values: tuple[tuple[str, ...], ...]
    """One entry a step of the axis, one value a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a point."""

    started_unix_s: float
    ended_unix_s: float | None = None
    outcome: str | None = None
    """completed, failed, timed out, interrupted or lost; None while it runs, or waits in a queue."""
    why: str | None = None
    """Of a failure, in one line."""
    process: int | None = None
    """The local script's process."""
    process_began: str | None = None
    """What the system says of that process's start, so that another one of the same number is not taken for it."""
    job_id: str | None = None
    node_hours: float = 0.0
    """Charged to the budget: measured once it has ended, before that all it may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One legal combination."""

    number: int
    """1-based, in the order of the product; illegal points have none."""
    name: str
    """Of its run directory within the sweep's: `007-TP2-MBS4`."""
    values: Mapping[str, str]
    nodes: int
    ranks: int
    run_time_s: int
    """Its limit."""
    script_sha256: str
    states_gib: float | None = None
    """Estimated: weights, gradients and optimizer states on the fullest rank; None where the model's size is not known."""
    attempts: tuple[Attempt, ...] = ()
    skipped: str | None = None
    """Why it will not be started; None when it will be, or was."""

    @property
    def outcome(self) -> str | None:
        """Of the last attempt; None before it has ended."""
        return self.attempts[-1].outcome if self.attempts else None

    @property
    def most_node_hours(self) -> float:
        """What one attempt may take."""
        return self.nodes * self.run_time_s / 3600

    @property
    def label(self) -> str:
        """`TP=2 MBS=4`."""
        return label(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """A combination that cannot run."""

    values: Mapping[str, str]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """All of `sweep.json`."""

    sweep_id: str
    model: str
    axes: tuple[Axis, ...]
    words: tuple[str, ...]
    """Trailing flags that all points share."""
    given: Mapping[str, str]
    """Knobs of the caller's environment."""
    where: str
    """local or slurm."""
    created_unix_s: float
    points: tuple[Point, ...]
    pruned: tuple[Pruned, ...] = ()
    budget_node_hours: float | None = None
    prune_oom: bool = False
    format_version: int = FORMAT_VERSION

    @property
    def varied(self) -> tuple[str, ...]:
        """Every name that varies, in the order given."""
        return tuple(name for axis in self.axes for name in axis.names)

    @property
    def node_hours(self) -> float:
        """Charged so far, over all attempts."""
        return sum(one.node_hours for point in self.points for one in point.attempts)


def label(values: Mapping[str, str]) -> str:
    """`TP=2 --lr=1e-3`."""
    return " ".join(f"{name}={value}" for name, value in values.items())


def grouped(pruned: Sequence[Pruned]) -> list[tuple[str, tuple[Pruned, ...]]]:
    """Reasons that differ in their numbers alone together, each with its combinations; the commonest first."""
    groups: dict[str, list[Pruned]] = {}
    for one in pruned:
        groups.setdefault(re.sub(r"\d+", "#", one.reason), []).append(one)
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [(members[0].reason, tuple(members)) for members in ordered]


_decode = msgspec.json.Decoder(Sweep).decode


def read_sweep(folder: Path) -> Sweep:
    """Raises RecordError when there is none or it cannot be read."""
    path = folder / SWEEP_FILE
    try:
        sweep = _decode(path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"{path}: no such file; {folder} is not a sweep's directory") from error
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path}: not the record of a sweep: {error}") from error
    if sweep.format_version > FORMAT_VERSION:
        raise RecordError(
            f"{path}: format {sweep.format_version} is newer than this moe_bench, which reads {FORMAT_VERSION}; update it"
        )
    return sweep


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Aside, then in place at once. Raises RecordError when it cannot be written."""
    path = folder / SWEEP_FILE
    aside = folder / f".{SWEEP_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(sweep), indent=1))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written: {error.strerror}; set OUTPUT_PATH to a folder that can be"
        ) from error


def find_sweep(name: str, *, base: Path, beside_runs: bool = True) -> Path | None:
    """The directory of a sweep given as its path, its id under `base`/sweeps, or an unambiguous part of the id.

    `beside_runs`: where runs are meant as well, a part that fits one of them, and `latest`, is a run's. None when it names no sweep. Raises RecordError when it fits several.
    """
    for candidate in (Path(name), base / SWEEPS_FOLDER / name):
        if (candidate / SWEEP_FILE).is_file():
            return candidate.resolve()
    if name == "latest" and beside_runs:
        return None
    if name == "latest":
        newest = newest_sweeps(base)
        return newest[0].resolve() if newest else None
    if beside_runs and any(name in run_dir.name for run_dir in run_dirs(base)):
        return None
    matches = sorted(folder for folder in sweep_dirs(base) if name in folder.name)
    if len(matches) > 1:
        shown = ", ".join(match.name for match in matches[:5])
        raise RecordError(
            f"{name!r} fits {len(matches)} sweeps in {base / SWEEPS_FOLDER}: {shown}; say more of one"
        )
    return matches[0].resolve() if matches else None


def newest_sweeps(base: Path) -> list[Path]:
    """Every sweep's directory under `base`, the one that changed last first."""
    changed = {folder: (folder / SWEEP_FILE).stat().st_mtime_ns for folder in sweep_dirs(base)}
    return sorted(changed, key=changed.__getitem__, reverse=True)


def sweep_dirs(base: Path) -> Iterator[Path]:
    """Every sweep's directory under `base`, in no order."""
    folder = base / SWEEPS_FOLDER
    if folder.is_dir():
        for one in folder.iterdir():
            if (one / SWEEP_FILE).is_file():
                yield one
