"""Profiles of a few steps: torch's profiler, and where the memory went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

PER_PHASE_TIMERS = ("--timing-log-level", "2")
"""Megatron's flags that make it time each phase of a step."""


@dataclass
class StepProfiler:
    """Profiles the steps from `first` to `last` (1-based, both included) and writes under `folder`.

    `kind` is "torch" (a Chrome trace and a table of operators) or "memory" (the same with every allocation, and a
    timeline of this process's memory). `tell` hears the path of each file.
    """

    kind: str
    folder: Path
    rank: int
    first: int
    last: int
    memory_bytes: Callable[[], float]
    tell: Callable[[str, str], None]
    has_written: bool = False
    """True once a profile is on disk."""
    _profiler: torch.profiler.profile | None = None
    _timeline: list[dict[str, float]] = field(default_factory=list)

    def before_first_step(self, first_step: int) -> None:
        """Start now when the first step made is already to be profiled; as many steps, from there, when all were to be earlier."""
        if self.last < first_step:
            self.first, self.last = first_step, first_step + self.last - self.first
        self.first = max(self.first, first_step)
        if self.first == first_step:
            self._start()

    def after_step(self, step: int) -> None:
        """Start, go on or finish."""
        if self.kind == "memory":
            now = {"step": float(step), "time_unix_s": time.time(), "bytes": self.memory_bytes()}
            self._timeline.append(now)
        if step == self.first - 1:
            self._start()
        if step == self.last:
            self.finish()

    def finish(self) -> None:
        """Write what was profiled; nothing when no step was."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"{self.kind}-rank-{self.rank}.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        self.tell("chrome trace", str(trace))
        by = "self_cpu_memory_usage" if self.kind == "memory" else "self_cpu_time_total"
        table = self.folder / f"operators-rank-{self.rank}.txt"
        table.write_text(self._profiler.key_averages().table(sort_by=by, row_limit=60))
        self.tell("operators", str(table))
        self.has_written = True
        self._profiler = None
        if self._timeline:
            timeline = self.folder / f"memory-timeline-rank-{self.rank}.json"
            timeline.write_text(json.dumps(self._timeline))
            self.tell("memory timeline", str(timeline))

    def _start(self) -> None:
        if self._profiler is None:
            self._profiler = torch.profiler.profile(
                profile_memory=self.kind == "memory", record_shapes=self.kind == "memory"
            )
            self._profiler.start()
