"""How far a preparation is: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from moe_bench.data.store import Progress
from moe_bench.units import GB, format_count, format_duration

LINE_INTERVAL_S = 10.0
BAR_INTERVAL_S = 0.2


class Meter:
    """Writes to stderr, so that stdout stays for results. Counts only what this run did, not what it resumed."""

    def __init__(self, *, total_raw_bytes: int | None, stream: TextIO = sys.stderr) -> None:
        self._total, self._stream = total_raw_bytes, stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._told = self._began
        self._resumed_text_bytes = 0
        self._first_raw_bytes: int | None = None
        self.text_bytes = 0
        """Text read by this run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live and self._first_raw_bytes is not None:
            self._stream.write("\n")

    @property
    def elapsed_s(self) -> float:
        """Since this run began."""
        return time.monotonic() - self._began

    def begin(self, progress: Progress) -> None:
        """What was stored before is not this run's work."""
        self._resumed_text_bytes = progress.text_bytes
        if progress.documents:
            self._stream.write(f"prepare: going on after {progress.documents:,} stored documents\n")

    def advance(self, progress: Progress, *, raw_bytes: int) -> None:
        """Say so, but not too often."""
        if self._first_raw_bytes is None:
            self._first_raw_bytes = raw_bytes
        self.text_bytes = progress.text_bytes - self._resumed_text_bytes
        now = time.monotonic()
        if now - self._told < (BAR_INTERVAL_S if self._live else LINE_INTERVAL_S):
            return
        self._told = now
        line = self._line(progress, raw_bytes, self._first_raw_bytes)
        self._stream.write(f"\r\x1b[2K{line}" if self._live else line + "\n")
        self._stream.flush()

    def _line(self, progress: Progress, raw_bytes: int, first_raw: int) -> str:
        elapsed = self.elapsed_s
        parts = [
            f"{format_count(progress.documents)} documents",
            f"{format_count(progress.tokens)} tokens",
            f"{self.text_bytes / 1e6 / elapsed:.2f} MB/s",
        ]
        if self._total:
            done = raw_bytes / self._total
            rate = (raw_bytes - first_raw) / elapsed
            left = format_duration((self._total - raw_bytes) / rate) if rate > 0 else "unknown"
            parts.insert(0, f"{_bar(done)} {done:4.0%} of {self._total / GB:.3g} GB")
            parts.append(f"{left} left")
        return "prepare: " + ", ".join(parts)


def _bar(done: float, width: int = 20) -> str:
    full = round(min(done, 1.0) * width)
    return "#" * full + "-" * (width - full)
