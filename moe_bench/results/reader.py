"""Reads a run's JSONL records: all of them, their end, or as they grow.

A writer that is killed may leave one unfinished line at a file's end. It is counted and named in `torn`, never an
error. A line that cannot be read anywhere else means that the file was damaged, and is refused with file and line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError
from moe_bench.results.records import (
    FORMAT_VERSION,
    STEPS_FILE,
    Event,
    Header,
    Step,
    StepBalance,
    StepRecord,
)

_HEADER_START = b'{"format":'
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Records[T]:
    """What a file (or several of one kind) held."""

    records: tuple[T, ...]
    torn: tuple[str, ...] = ()
    """Places (`file:line`) of lines that a killed writer left unfinished."""
    rolled_back: int = 0
    """Steps that a restart from an earlier checkpoint made again; only the last making is in `records`."""
    attempt_starts: tuple[int, ...] = ()
    """Index into `records` of the first one of each attempt: 0, and one more for each restart."""


def read_steps(run_dir: Path) -> Records[StepBalance]:
    """Every step that counts, in order; empty when the run made none. Raises RecordError."""
    lines = _read_file(run_dir / STEPS_FILE, kind="steps", decode=_decode_balance)
    return _without_rolled_back(lines)


def read_expert_loads(run_dir: Path, steps: frozenset[int]) -> tuple[StepRecord, ...]:
    """The full records of those of the steps asked for that hold each expert's count: another version may not have written it."""
    path = run_dir / STEPS_FILE
    if not path.is_file():
        return ()
    wanted: dict[int, bytes] = {}
    with path.open("rb") as file:
        for line in file:
            step = _step_number(line)
            if step in steps:
                wanted[step] = line
    found: list[StepRecord] = []
    for _, line in sorted(wanted.items()):
        with contextlib.suppress(msgspec.MsgspecError):
            found.append(_decode_full(line))
    return tuple(found)


def read_events(run_dir: Path) -> Records[Event]:
    """The events of every rank and of the launcher, in order of time. Raises RecordError."""
    parts = [_read_file(path, kind="events", decode=_decode_event) for path in event_files(run_dir)]
    merged = sorted((e for part in parts for e in part.records), key=lambda e: e.time_unix_s)
    return Records(
        records=tuple(merged),
        torn=tuple(place for part in parts for place in part.torn),
    )


def event_files(run_dir: Path) -> list[Path]:
    """Those that exist so far: one for each rank or launcher that wrote an event."""
    return sorted((run_dir / "results").glob("events*.jsonl"))


def read_last_steps(run_dir: Path, count: int) -> tuple[Step, ...]:
    """Up to `count` steps from the file's end, at a cost that does not grow with the run. Raises RecordError."""
    path = run_dir / STEPS_FILE
    if not path.is_file():
        return ()
    try:
        return _last_steps(path, count)
    except OSError as error:
        raise _unreadable(path, error) from error


class Tail[T]:
    """Reads what was appended to one file since the last call. Never raises for a damaged line: it counts it."""

    def __init__(self, path: Path, decode: Callable[[bytes], T]) -> None:
        self.path = path
        self.damaged = 0
        """Complete lines that could not be read."""
        self._decode = decode
        self._offset = 0
        self._unfinished = b""

    def poll(self) -> list[T]:
        """New records; empty while the file is missing or has not grown."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return list(self._records(lines))

    def _records(self, lines: list[bytes]) -> Iterator[T]:
        for line in lines:
            if line.startswith(_HEADER_START):
                continue
            try:
                yield self._decode(line)
            except msgspec.MsgspecError:
                self.damaged += 1


def tail_steps(run_dir: Path) -> Tail[StepBalance]:
    """Follows `results/steps.jsonl`."""
    return Tail(run_dir / STEPS_FILE, _decode_balance)


def tail_events(path: Path) -> Tail[Event]:
    """Follows one of `event_files`."""
    return Tail(path, _decode_event)


_decode_balance = msgspec.json.Decoder(StepBalance).decode
_decode_full = msgspec.json.Decoder(StepRecord).decode
_decode_step = msgspec.json.Decoder(Step).decode
_decode_event = msgspec.json.Decoder(Event).decode
_decode_header = msgspec.json.Decoder(Header).decode


def _read_file[T](path: Path, *, kind: str, decode: Callable[[bytes], T]) -> Records[T]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Records(records=())
    except OSError as error:
        raise _unreadable(path, error) from error
    lines = data.splitlines()
    records: list[T] = []
    torn: list[str] = []
    starts: list[int] = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.startswith(_HEADER_START):
                _check_header(_decode_header(line), path=path, number=number, kind=kind)
                starts.append(len(records))
            else:
                records.append(decode(line))
        except msgspec.MsgspecError as error:
            unfinished = number == len(lines) and not data.endswith(b"\n")
            restarted = number < len(lines) and lines[number].startswith(_HEADER_START)
            if not (unfinished or restarted):
                raise _damaged(path, number, error) from error
            torn.append(f"{path}:{number}")
    return Records(records=tuple(records), torn=tuple(torn), attempt_starts=tuple(starts))


def _check_header(header: Header, *, path: Path, number: int, kind: str) -> None:
    if header.format != kind:
        raise RecordError(
            f"{path}:{number}: holds {header.format!r} records where {kind!r} belong; "
            "was the file renamed or copied from another place?"
        )
    if header.version > FORMAT_VERSION:
        raise RecordError(
            f"{path}:{number}: record format {header.version} is newer than this moe_bench, which "
            f"reads up to {FORMAT_VERSION}; read it with the version that wrote it"
        )


def _unreadable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"{path} cannot be read: {error.strerror}; mend what it is, or who may read it"
    )


def _damaged(path: Path, number: int, error: msgspec.MsgspecError) -> RecordError:
    return RecordError(
        f"{path}:{number}: damaged record ({error}); the lines before it are whole: "
        f"keep them with `head -n {number - 1} {path.name}` in a copy, or restore the file"
    )


def _without_rolled_back(lines: Records[StepBalance]) -> Records[StepBalance]:
    """A restart from the checkpoint of step n makes n+1, ... again: what was recorded of them before is void."""
    kept: list[StepBalance] = []
    starts: list[int] = []
    for index, record in enumerate(lines.records):
        while kept and kept[-1].step >= record.step:
            kept.pop()
        if index in lines.attempt_starts:
            starts = [start for start in starts if start < len(kept)] + [len(kept)]
        kept.append(record)
    return Records(
        records=tuple(kept),
        torn=lines.torn,
        rolled_back=len(lines.records) - len(kept),
        attempt_starts=tuple(starts),
    )


class _StepNumber(msgspec.Struct):
    step: int


_decode_step_number = msgspec.json.Decoder(_StepNumber).decode


def _step_number(line: bytes) -> int | None:
    try:
        return _decode_step_number(line).step
    except msgspec.MsgspecError:
        return None


def _last_steps(path: Path, count: int) -> tuple[Step, ...]:
    found: list[Step] = []
    for line in _lines_backwards(path):
        if not line or line.startswith(_HEADER_START):
            continue
        try:
            step = _decode_step(line)
        except msgspec.MsgspecError:
            continue  # the torn end; a full reading refuses damage elsewhere
        if found and step.step >= found[-1].step:
            continue  # made again after a restart
        found.append(step)
        if len(found) == count:
            break
    return tuple(reversed(found))


def _lines_backwards(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        position = file.seek(0, 2)
        rest = b""
        while position > 0:
            size = min(_TAIL_BYTES, position)
            position -= size
            file.seek(position)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest
