"""Appends a run's records as JSONL: one `os.write` a line, so that a killed process leaves whole lines, but perhaps the last."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError
from moe_bench.results.records import (
    EVENTS_FILE,
    FORMAT_VERSION,
    STEPS_FILE,
    Event,
    Header,
    StepRecord,
    events_file,
)

_encoder = msgspec.json.Encoder()


class RunWriter:
    """Writes one rank's share of a run's record.

    Each file has exactly one writer at a time: `results/steps.jsonl` the one rank that calls `step`, and each rank's
    events a file of their own (`results/events.jsonl` for rank 0, `events-rank-N.jsonl` otherwise), because appends
    from several nodes to one file interleave on network file systems. A file is created by its first record.
    """

    def __init__(self, run_dir: Path | str, *, rank: int = 0, source: str | None = None) -> None:
        """`source` names a writer that is not a rank, such as "launcher", and so its events file."""
        root = Path(run_dir)
        self._steps = _AppendOnlyFile(root / STEPS_FILE, kind="steps")
        self._events = _AppendOnlyFile(
            root / (EVENTS_FILE if source is None and rank == 0 else events_file(source or rank)),
            kind="events",
        )

    def step(self, record: StepRecord) -> None:
        """Append one step. Raises RecordError when the disk refuses it."""
        self._steps.append(record)

    def event(self, event: Event) -> None:
        """Append one event. Raises RecordError when the disk refuses it."""
        self._events.append(event)

    def close(self) -> None:
        """Close the files; later calls of `step` or `event` open them again."""
        self._steps.close()
        self._events.close()


def close_record(run_dir: Path, outcome: str) -> None:
    """Write the `end` that the ranks did not come to write, as the launcher. Raises RecordError."""
    writer = RunWriter(run_dir, source="launcher")
    writer.event(Event(event="end", time_unix_s=time.time(), fields={"outcome": outcome}))
    writer.close()


class _AppendOnlyFile:
    """A JSONL file that is opened, with a header line, by its first record."""

    def __init__(self, path: Path, *, kind: str) -> None:
        self._path = path
        self._kind = kind
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        """A mirror's thread reports its failures while the training thread writes."""

    def append(self, record: StepRecord | Event) -> None:
        line = _encoder.encode(record) + b"\n"
        with self._lock:
            self._append_line(line)

    def _append_line(self, line: bytes) -> None:
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            _write_all(self._descriptor, line)
        except OSError as error:
            self.close()  # the next record starts with a header, which marks this line as torn
            raise RecordError(
                f"cannot append to {self._path}: {error.strerror}; free space there, or choose another "
                "OUTPUT_PATH, and start the run again"
            ) from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o644)
        header = Header(format=self._kind, version=FORMAT_VERSION, time_unix_s=time.time())
        _write_all(descriptor, _line_break(descriptor) + _encoder.encode(header) + b"\n")
        return descriptor


def _line_break(descriptor: int) -> bytes:
    """What ends a line that an earlier writer, killed half-way, left open."""
    size = os.fstat(descriptor).st_size
    return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""


def _write_all(descriptor: int, line: bytes) -> None:
    """One write; more only where the system accepts a part (a nearly full disk)."""
    written = os.write(descriptor, line)
    while written < len(line):
        written += os.write(descriptor, line[written:])
