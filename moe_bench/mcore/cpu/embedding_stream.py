"""Streams and events: work on a host is done when the call returns, so all of them are one stream."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch


class Event:
    """A point in time. Everything before it is done."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._time_s: float | None = None

    def record(self, _stream: Any = None) -> None:
        """Now."""
        self._time_s = time.perf_counter()

    def wait(self, _stream: Any = None) -> None:
        """Already over."""

    def synchronize(self) -> None:
        """Already over."""

    def query(self) -> bool:
        """Already over."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        if self._time_s is None or end._time_s is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._time_s - self._time_s) * 1e3


class Stream:
    """A queue whose work is done as it is queued."""

    cuda_stream = 0
    device = torch.device("cpu")
    priority = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._entered: list[Stream] = []

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Least and greatest priority."""
        return (0, -1)

    def wait_stream(self, _stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, _event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All done."""
        return True

    def __enter__(self) -> Stream:
        self._entered.append(current_stream())
        set_stream(self)
        return self

    def __exit__(self, *_exc: object) -> None:
        set_stream(self._entered.pop())


_default = Stream()
_current = [_default]


def current_stream(*_args: Any, **_kwargs: Any) -> Stream:
    """The stream last entered or set."""
    return _current[0]


def default_stream(*_args: Any, **_kwargs: Any) -> Stream:
    """The one every process starts with."""
    return _default


def set_stream(stream: Stream | None) -> None:
    """Make `stream` current; None changes nothing, as in torch."""
    if stream is not None:
        _current[0] = stream


def stream_context(stream: Stream | None) -> Any:
    """`torch.cuda.stream`."""
    return contextlib.nullcontext() if stream is None else stream


def empty_context(*_args: Any, **_kwargs: Any) -> Any:
    """An NVTX range."""
    return contextlib.nullcontext()
