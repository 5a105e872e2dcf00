"""Rank groups for tests: Megatron is imported once in the pytest process, and every group is forked from it."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TIMEOUT_S = 400.0


def run_ranks(
    body: Callable[[], Any],
    world_size: int = 2,
    *,
    layout: dict[str, int] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Run `body` on every rank of a gloo group with the CPU embedding in place; what each returned, by rank.

    `layout` (tensor_model_parallel_size=..., ...) is given to Megatron's `initialize_model_parallel`, with its random
    seeds, before `body`; without it only the process group exists. The first rank that raises fails the caller's test
    with its traceback, and the others are ended. `body` may be a closure; what it returns is pickled.
    """
    with megatron(world_size), tempfile.TemporaryDirectory() as folder:
        ranks = [
            _fork(body, rank, world_size, layout, Path(folder) / "store")
            for rank in range(world_size)
        ]
        return _collect(ranks, timeout_s)


@contextlib.contextmanager
def megatron(world_size: int) -> Iterator[None]:
    """The embedding in place and Megatron imported: what is forked here need not import it again."""
    from moe_bench.mcore.cpu.embedding import install
    from moe_bench.runtime.rank import export_for_cpu

    export_for_cpu()
    with install(local_world_size=world_size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import megatron.training  # noqa: F401

            import moe_bench.mcore.entry
            import moe_bench.mcore.recording  # noqa: F401
        yield


def _fork(
    body: Callable[[], Any],
    rank: int,
    world_size: int,
    layout: dict[str, int] | None,
    store: Path,
) -> tuple[int, int]:
    """(process id, descriptor its outcome comes from)."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    os.setpgid(0, 0)  # what Megatron starts beside a rank (its checkpoint writer) is ended with it
    outcome: tuple[bool, Any] = (False, "the rank left without an outcome")
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _join(rank, world_size, layout, store)
        outcome = (True, body())
    except BaseException:  # noqa: BLE001 - whatever it is, the test that forked this rank hears of it
        outcome = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
    finally:
        try:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(pickle.dumps(outcome))
        finally:  # also where nobody reads any more: a rank must not go on with the tests it was forked from
            os._exit(0)


def _join(rank: int, world_size: int, layout: dict[str, int] | None, store: Path) -> None:
    import torch

    # One thread: a child forked from a process that has used OpenMP must not start its threads anew (libgomp).
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(store), world_size),
        rank=rank,
        world_size=world_size,
    )
    if layout is not None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(**layout)
        torch.manual_seed(1234)
        model_parallel_cuda_manual_seed(1234)


def _collect(ranks: list[tuple[int, int]], timeout_s: float) -> list[Any]:
    received = {descriptor: b"" for _, descriptor in ranks}
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    selector = selectors.DefaultSelector()
    for _, descriptor in ranks:
        selector.register(descriptor, selectors.EVENT_READ)
    try:
        while len(results) < len(ranks):
            ready = selector.select(timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks did not finish within {timeout_s} s")
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 20)
                received[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                    results[key.fd] = _outcome(received[key.fd])
    finally:
        for process, descriptor in ranks:
            if descriptor not in results:
                os.kill(process, signal.SIGKILL)
            os.close(descriptor)
            os.waitpid(process, 0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
    return [results[descriptor] for _, descriptor in ranks]


def _outcome(message: bytes) -> Any:
    assert message, "a rank died without a word (killed by a signal?)"
    worked, value = pickle.loads(message)
    assert worked, value
    return value
