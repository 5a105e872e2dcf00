"""How a training is told to stop: by a signal, and by a file for ranks that were not listening yet."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from moe_bench.results.records import STOP_FILE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGURG)
"""SIGURG is what a job's script sends: whatever else runs beside a rank (savers, data loaders, a profiler) ignores it."""


class Stoppable(Protocol):
    """What is told to stop."""

    stop_requested: bool

    @property
    def training(self) -> bool:
        """True once the first step has begun."""
        ...


@contextlib.contextmanager
def graceful_stop(recorder: Stoppable, run_dir: Path) -> Iterator[None]:
    """Within the block a signal ends the training after the step in progress, on all ranks at the same step.

    Before the first step it ends this process at once, with 128 + SIGTERM, as does a stop that was asked for earlier.
    """

    def stop(number: int, _frame: object) -> None:
        recorder.stop_requested = True
        if not recorder.training:
            sys.exit(128 + (signal.SIGTERM if number == signal.SIGURG else number))

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        if (run_dir / STOP_FILE).exists():
            stop(signal.SIGTERM, None)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
