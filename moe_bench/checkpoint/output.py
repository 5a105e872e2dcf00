"""The folder that a conversion writes: begun by one plan, shared by its processes, taken for whole only at the end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_bench.checkpoint.part_file import explained
from moe_bench.errors import CheckpointError
from moe_bench.units import format_bytes

MANIFEST = "moe_bench_manifest.json"
LEDGER = ".convert"
"""Folder of the work in progress; gone once the output is whole."""
_LOCK_WAIT_S = 60.0


def is_finished(out: Path, identity: str, last: str) -> bool:
    """Whether `out` is whole and of this plan. `last` is the file that is written last.

    Raises CheckpointError when it is whole and of another plan. What a run killed in its last act left is removed.
    """
    if not (out / last).exists():
        return False
    with suppress(OSError, ValueError, AttributeError):
        if json.loads((out / MANIFEST).read_bytes()).get("plan") == identity:
            shutil.rmtree(out / LEDGER, ignore_errors=True)
            return True
    raise CheckpointError(
        f"{out} already holds a whole checkpoint of another source or other options; "
        "nothing was written; name another folder or remove it yourself"
    )


@contextmanager
def begun(out: Path, identity: str, node: int = 0) -> Iterator[Path]:
    """The folder for work in progress, held until the end by this process and, through fork, by its workers.

    Raises CheckpointError when `out` holds something else, when another process has it, and for whatever the file
    system refuses while it is held.
    """
    ledger, stated = out / LEDGER, out / LEDGER / "plan"
    try:
        holds_something = out.exists() and any(out.iterdir())
        # Only then: another node may begin meanwhile.
        if holds_something and not ledger.is_dir():
            raise CheckpointError(
                f"{out} is not empty and not an unfinished conversion; nothing was written; name another folder"
            )
        ledger.mkdir(parents=True, exist_ok=True)
        if not stated.exists():
            write_whole(stated, identity.encode(), ledger)
        if stated.read_text() != identity:
            raise CheckpointError(
                f"{out} holds an unfinished conversion of another source, other options or another version; "
                "finish that one with its own command, or remove the folder"
            )
        with _lock(ledger / f"lock-{node}"):
            yield ledger
    except OSError as error:
        raise explained(Path(error.filename or out), error) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A second run waits until the first one's processes are gone."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{path} is held: another convert is writing to this folder; wait until it ends"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def check_space(out: Path, needed: int) -> None:
    """Raises CheckpointError when the file system has not `needed` bytes left."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(
            f"{out}: {format_bytes(needed)} are still to be written and {format_bytes(free)} are free"
        )


def write_whole(path: Path, data: bytes, scratch: Path) -> None:
    """Write a small file so that it is whole or absent, even after a power failure; half of it may stay in `scratch`."""
    temporary = scratch / f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(path: Path) -> None:
    """Make renames in it durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
