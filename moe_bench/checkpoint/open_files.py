"""Reading ranges of many large files through a few descriptors."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT = 8


class OpenFiles:
    """Files being read; the descriptors used last stay open. Not shared between processes."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def __del__(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def read(self, path: Path, offset: int, into: memoryview) -> bool:
        """Fill `into` from byte `offset`; False when the file ends before that."""
        fd = self._descriptor(path)
        done = 0
        while done < len(into):
            got = os.preadv(fd, [into[done:]], offset + done)
            if got == 0:
                return False
            done += got
        return True

    def prefetch(self, path: Path, offset: int, length: int) -> None:
        """Ask the kernel to fetch a range that will be read soon."""
        os.posix_fadvise(self._descriptor(path), offset, length, os.POSIX_FADV_WILLNEED)

    def opened(self, path: Path) -> tuple[int, int]:
        """A descriptor, to be used before any other file is read, and the file's size."""
        fd = self._descriptor(path)
        return fd, os.fstat(fd).st_size

    def _descriptor(self, path: Path) -> int:
        fd = self._fds.pop(path, None)
        if fd is None:
            while len(self._fds) >= _LIMIT:
                os.close(self._fds.pop(next(iter(self._fds))))
            fd = os.open(path, os.O_RDONLY)
        self._fds[path] = fd
        return fd
