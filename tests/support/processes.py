"""The processes that a command has started."""

from __future__ import annotations

import time
from pathlib import Path


def living(group: int) -> list[int]:
    """Those of a process group; one that is dead and not yet collected does not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def wait_for_end(group: int, patience_s: float = 60) -> None:
    """Until none of the group lives. What a killed command started may take a moment to notice."""
    deadline_s = time.monotonic() + patience_s
    while left := living(group):
        assert time.monotonic() < deadline_s, f"{left} outlived their command"
        time.sleep(0.02)
