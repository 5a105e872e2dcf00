"""Forked workers that share a list of tasks; a failure in one reaches the parent with its words, and stops all."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from moe_bench.errors import CheckpointError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2

type Work = Callable[[Any], Any]
"""One task -> its result; both are small values that can be pickled."""


def run_tasks(
    tasks: Sequence[Any],
    start: Callable[[], Work],
    *,
    processes: int,
    on_idle: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """Yield (position, result) as tasks finish.

    `start` is called once in each worker and returns what does a task, so that its imports happen there.
    Raises CheckpointError with the worker's own message; a worker that dies takes the others with it.
    `on_idle` is called about five times a second, to show progress.
    """
    context = multiprocessing.get_context("fork")
    counter: Synchronized[int] = context.Value("i", 0)
    workers: dict[Connection, BaseProcess] = {}
    for _ in range(min(processes, len(tasks))):
        ours, theirs = context.Pipe(duplex=False)
        parent = os.getpid()
        process: BaseProcess = context.Process(
            target=_worker, args=(theirs, counter, tasks, start, parent), daemon=True
        )
        process.start()
        theirs.close()
        workers[ours] = process
    try:
        yield from _collect(workers, on_idle)
    finally:
        for process in workers.values():
            process.kill()
            process.join()


def _collect(
    workers: dict[Connection, BaseProcess], on_idle: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    alive = dict(workers)
    while alive:
        for connection in wait(list(alive), timeout=_POLL_S):
            assert isinstance(connection, Connection)
            try:
                kind, position, value = connection.recv()
            except EOFError:
                process = alive.pop(connection)
                process.join()
                if process.exitcode:
                    raise CheckpointError(_death(process.exitcode)) from None
                continue
            if kind == "error":
                raise CheckpointError(value)
            yield position, value
        on_idle()


def _death(exitcode: int) -> str:
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        more = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return f"a worker process was ended by {name}{more}; run the same command again to resume"
    return f"a worker process ended with exit code {exitcode}; its traceback is above"


def _worker(
    connection: Connection,
    counter: Synchronized[int],
    tasks: Sequence[Any],
    start: Callable[[], Work],
    parent: int,
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # numpy's import would start a thread for each core
    work = start()
    while True:
        with counter.get_lock():
            position = counter.value
            counter.value += 1
        if position >= len(tasks):
            return
        try:
            message = ("done", position, work(tasks[position]))
        except CheckpointError as error:
            message = ("error", position, str(error))
        except OSError as error:
            message = (
                "error",
                position,
                f"{error.filename or 'input or output'}: {error.strerror}",
            )
        except MemoryError:
            message = (
                "error",
                position,
                "a worker is out of memory; run the same command with fewer --processes",
            )
        with suppress(BrokenPipeError):
            connection.send(message)
        if message[0] == "error":
            return
