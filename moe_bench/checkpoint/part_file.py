"""A large file that is written piece by piece and has its final name only when it is whole and on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from moe_bench.errors import CheckpointError

_WRITE_BACK_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2


def part_of(path: Path) -> Path:
    """Where the file lies until it is whole."""
    return path.with_name(f"{path.name}.part")


class PartFile:
    """`NAME.part`, open for writing.

    The kernel is told to write back every few MiB, so that the disk works while the next piece is read and the final
    sync finds little left to do. Raises CheckpointError naming the file when the disk is full or cannot be written.
    """

    def __init__(self, path: Path, *, anew: bool = True) -> None:
        """`anew` drops what an earlier run left; several processes that write parts of one file pass False."""
        self._path, self._part = path, part_of(path)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if anew else 0)
        self._fd = os.open(self._part, flags, 0o644)
        self._dirty_from = self._dirty_to = 0

    def write(self, data: memoryview | bytes, at: int) -> None:
        """Write all of `data` at offset `at`."""
        view = memoryview(data)
        if at != self._dirty_to:
            self.start_write_back()
            self._dirty_from = self._dirty_to = at
        try:
            while len(view):
                written = os.pwrite(self._fd, view, self._dirty_to)
                self._dirty_to += written
                view = view[written:]
        except OSError as error:
            raise explained(self._part, error) from error
        if self._dirty_to - self._dirty_from >= _WRITE_BACK_BYTES:
            self.start_write_back()

    def start_write_back(self) -> None:
        """Hand what was written to the disk's queue; returns at once."""
        length = self._dirty_to - self._dirty_from
        if length and _sync_file_range is not None:
            _sync_file_range(self._fd, self._dirty_from, length, _SYNC_FILE_RANGE_WRITE)
        self._dirty_from = self._dirty_to

    def finish(self, num_bytes: int) -> None:
        """Sync, check the size and give the file its name."""
        try:
            size = os.fstat(self._fd).st_size
            if size != num_bytes:
                raise CheckpointError(f"{self._part}: has {size} bytes, planned {num_bytes}")
            os.fsync(self._fd)
            self._part.rename(self._path)
        except OSError as error:
            raise explained(self._part, error) from error

    def close(self) -> None:
        """Close the descriptor; a file that was not finished keeps its temporary name."""
        os.close(self._fd)


def explained(path: Path, error: OSError) -> CheckpointError:
    """What the file system refused, and the way on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path}: the disk is full; free some space and run the same command again, it resumes"
        )
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; mend this and run the same command again, it resumes"
    )


def _load_sync_file_range() -> ctypes._NamedFuncPointer | None:
    """Linux's own call, which Python's os lacks; only a hint here, so its absence or failure changes no byte."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _load_sync_file_range()
