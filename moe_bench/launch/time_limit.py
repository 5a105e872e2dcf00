"""RUN_TIME: how long a job may take, as Slurm writes it. Pure."""

from __future__ import annotations

import re

from moe_bench.config.knobs import UNLIMITED
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError

DEFAULT = "00:20:00"
"""What a launch without RUN_TIME asks for."""
_SPELLING = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def written(run: ResolvedRun) -> str:
    """MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, or UNLIMITED. Raises LaunchError for anything else."""
    text = run.knob("RUN_TIME") or DEFAULT
    if text.upper() in UNLIMITED:
        return UNLIMITED[0]
    if not _SPELLING.fullmatch(text):
        raise LaunchError(
            f"RUN_TIME={text!r} ({run.place('RUN_TIME')}) is not Slurm's [DAYS-]HH:MM:SS; write 00:20:00 for 20 minutes"
        )
    return text


def is_unlimited(run: ResolvedRun) -> bool:
    """Whether the job may take as long as it likes."""
    return written(run) == UNLIMITED[0]


def seconds(run: ResolvedRun) -> int:
    """More than 0. Raises LaunchError for what is no time, none at all, or no limit."""
    text = written(run)
    if is_unlimited(run):
        raise LaunchError(
            f"RUN_TIME={text} ({run.place('RUN_TIME')}) sets no limit, and one is counted with here; write HH:MM:SS"
        )
    days, first, *more = _SPELLING.fullmatch(text).groups()  # type: ignore[union-attr]
    parts = [int(first), *(int(part) for part in more if part is not None)]
    if days is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, secs = (*parts, 0, 0)[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs
    if total == 0:
        raise LaunchError(
            f"RUN_TIME={text} ({run.place('RUN_TIME')}) is no time at all; write HH:MM:SS"
        )
    return total
