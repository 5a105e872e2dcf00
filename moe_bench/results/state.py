"""Where a run stands, told from its files alone."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.manifest import RUN_FILE
from moe_bench.results.reader import event_files, read_events, read_last_steps
from moe_bench.results.records import STEPS_FILE, Event, Step

SILENT_AFTER_S = 120.0
"""A run that wrote nothing for this long, and for ten of its steps, is no longer called running."""


class State(enum.StrEnum):
    """What the record shows; a process that vanished without a word shows as `silent`."""

    NOT_STARTED = "not started"
    RUNNING = "running"
    SILENT = "silent"
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """State, and the last steps it was told from."""

    state: State
    last_steps: tuple[Step, ...]
    """Up to 20, in order."""
    silent_s: float
    """Since the run last wrote something."""


def standing(run_dir: Path, *, now_unix_s: float | None = None) -> Standing:
    """Reads the events and the end of the steps: quick however long the run. Raises RecordError."""
    now = time.time() if now_unix_s is None else now_unix_s
    steps = read_last_steps(run_dir, 20)
    silent_s = max(now - _last_written_unix_s(run_dir), 0.0)
    state = state_of(read_events(run_dir).records, steps=steps, silent_s=silent_s)
    return Standing(state=state, last_steps=steps, silent_s=silent_s)


def state_of(events: tuple[Event, ...], *, steps: tuple[Step, ...], silent_s: float) -> State:
    """From the events after the last start (a restart begins anew), and the silence since."""
    begun = max((i for i, e in enumerate(events) if e.event == "start"), default=0)
    for event in reversed(events[begun:]):
        if event.event == "end":
            return _outcome(str(event.fields.get("outcome", "completed")))
        if event.event == "error":
            return State.FAILED
    if not events and not steps:
        return State.NOT_STARTED
    patience_s = max(SILENT_AFTER_S, 10 * steps[-1].step_time_s if steps else 0.0)
    return State.SILENT if silent_s > patience_s else State.RUNNING


def has_ended(run_dir: Path, since_unix_s: float = 0.0) -> bool:
    """Whether the record was closed, in an attempt that began then or later. Raises RecordError."""
    events = read_events(run_dir).records
    return any(one.event == "end" and one.time_unix_s >= since_unix_s for one in events)


def _outcome(outcome: str) -> State:
    try:
        return State(outcome)
    except ValueError:
        return State.STOPPED


def _last_written_unix_s(run_dir: Path) -> float:
    files = [run_dir / STEPS_FILE, *event_files(run_dir), run_dir / RUN_FILE]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
