"""What a batch job's own log says of its end: the script's words and Slurm's, when nobody else remembers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

TAIL_BYTES = 64 * 1024
_ATTEMPT = re.compile(
    r"moe_bench: job \d+, restart \d+(?:, nodes \S+, rendezvous (?P<host>\S+):\d+)?"
)
_BY_SLURM = re.compile(
    r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+( DUE TO (?P<cause>[A-Z ]+?))?,? ?(SEE .*)?\*\*\*"
)
_TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (\d+)\S*: .+")
_LOST_NODE = re.compile(r"Node failure on \S+")
_GOING_ON = re.compile(r"moe_bench: .*: requeueing job")
_NOT_GOING_ON = re.compile(r"moe_bench: .*not requeued")
_SRUN_ENDED = re.compile(r"moe_bench: srun ended with (\d+)")
_CAUSES = {
    "TIME LIMIT": "timeout",
    "NODE FAILURE": "node fail",
    "PREEMPTION": "preempted",
    "JOB REQUEUE": "requeued",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWords:
    """The end of the newest attempt's log."""

    ending: str | None = None
    """timeout, node fail, preempted, cancelled, requeued, stopped or failed; None while nothing tells of an end."""
    line: str | None = None
    """The line that told most."""
    from_outside: bool = False
    """True when it was not the ranks that ended the job."""
    first_rank: int | None = None
    """The rank whose end srun told first; None where it told of none."""
    first_line: str = ""
    """srun's word on it: Killed, Segmentation fault, Exited with exit code 1, ..."""
    silent_host: str | None = None
    """The node that ran the script, while the script has not spoken of its end: where the job has ended, that node is lost."""


def last_words(logs: Path, job_id: str) -> LastWords:
    """Of the job's own log; empty when there is none."""
    path = logs / f"slurm-{job_id}.log"
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            return read(file.read().decode(errors="replace").splitlines())
    except FileNotFoundError:
        return LastWords()


def read(lines: list[str]) -> LastWords:
    """From the log's lines; those of earlier attempts count only while the newest has not begun to speak of its end."""
    attempts = [(i, match) for i, line in enumerate(lines) if (match := _ATTEMPT.search(line))]
    begun, attempt = attempts[-1] if attempts else (0, None)
    found = LastWords(silent_host=attempt["host"] if attempt else None)
    first: re.Match[str] | None = None
    for line in lines[begun:]:
        found = _after(line.strip(), found)
        first = first or _TASK_ENDED.search(line)
    if first is None:
        return found
    return replace(found, first_rank=int(first[1]), first_line=first[0])


def _after(line: str, before: LastWords) -> LastWords:
    if match := _BY_SLURM.search(line):
        ending = _CAUSES.get(match["cause"] or "", "cancelled")
        if before.ending == ending in ("requeued", "node fail"):
            return before  # srun's or the script's own word on it, which says more
        return LastWords(ending=ending, line=line, from_outside=ending != "requeued")
    if match := _LOST_NODE.search(line):
        return LastWords(ending="node fail", line=match[0], from_outside=True)
    return before if before.from_outside else _after_own(line, before)


def _after_own(line: str, before: LastWords) -> LastWords:
    """A line of the batch script itself."""
    if _GOING_ON.search(line):
        return LastWords(ending="requeued", line=line, from_outside="node failure" in line)
    if _NOT_GOING_ON.search(line):
        ending = "failed" if before.ending == "failed" else "stopped"
        return LastWords(ending=ending, line=line, from_outside="node failure" in line)
    if match := _SRUN_ENDED.search(line):
        return LastWords() if match[1] == "0" else LastWords(ending="failed", line=line)
    return before
