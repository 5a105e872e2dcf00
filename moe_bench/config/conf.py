"""What the `.conf` files did, read from the log that `conf.sh` writes. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moe_bench.config.run import Origin, Overridden, Setting
from moe_bench.errors import ConfigError

_FIELDS = {b"F": 1, b"A": 1, b"C": 3, b"D": 2, b"V": 3, b"E": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfFile:
    """One `.conf` to run."""

    path: str
    layer: str
    shown: str
    """The path as messages show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfVariables:
    """The shell's variables after the last file."""

    settings: Mapping[str, Setting]
    """Every scalar variable; of layer "environment" where no file changed it."""
    exported: frozenset[str]


@dataclass(slots=True)
class _FileLog:
    file: ConfFile
    places: list[tuple[str, str]]
    """Each command with its place, in the order run."""
    assigned: dict[str, str]
    """name -> place of a command that builds the name it assigns."""
    defaults: dict[str, tuple[str, str]]
    """name -> (value it would have had but for the environment, place)."""
    values: dict[str, tuple[str, bool]]
    done: bool = False


def variables(
    log: bytes,
    files: tuple[ConfFile, ...],
    environment: Mapping[str, str],
    shown: Callable[[str], str],
) -> ConfVariables:
    """Fold the log into settings. `shown` shortens a path for messages."""
    current: dict[str, Setting] = {
        name: Setting(value=value, origin=Origin(layer="environment", place="environment"))
        for name, value in environment.items()
    }
    values: Mapping[str, tuple[str, bool]] = {}
    for file_log in _file_logs(log, files, shown):
        values = file_log.values
        for name, (value, _) in values.items():
            before = current.get(name)
            current[name] = _after_file(name, value, before, file_log)
    exported = frozenset(name for name, (_, is_exported) in values.items() if is_exported)
    settings = {name: current[name] for name in values} if files else current
    return ConfVariables(settings=settings, exported=exported if files else frozenset(current))


def _after_file(name: str, value: str, before: Setting | None, file_log: _FileLog) -> Setting:
    if before is None or before.value != value:
        origin = Origin(layer=file_log.file.layer, place=_place_of(name, file_log))
        lost: tuple[Overridden, ...] = ()
        if before is not None:
            lost = (Overridden(value=before.value, origin=before.origin), *before.overrode)
        return Setting(value=value, origin=origin, overrode=lost)
    if name in file_log.defaults and file_log.defaults[name][0] != value:
        default, place = file_log.defaults[name]
        loser = Overridden(value=default, origin=Origin(layer=file_log.file.layer, place=place))
        return Setting(value=value, origin=before.origin, overrode=(loser, *before.overrode))
    return before


def _place_of(name: str, file_log: _FileLog) -> str:
    """Where the last command that mentions an assignment to `name` stands; the file alone when none does."""
    if name in file_log.assigned:
        return file_log.assigned[name]
    assigns = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name)}(\+?=|:=)")
    mentions = re.compile(rf"\b{re.escape(name)}\b")
    for pattern in (assigns, mentions):
        for command, place in reversed(file_log.places):
            if pattern.search(command):
                return place
    return file_log.file.shown


def _file_logs(
    log: bytes, files: tuple[ConfFile, ...], shown: Callable[[str], str]
) -> Iterator[_FileLog]:
    file_log: _FileLog | None = None
    remaining = iter(files)
    for kind, fields in _records(log):
        if kind == b"F":
            file_log = _FileLog(
                file=next(remaining), places=[], assigned={}, defaults={}, values={}
            )
        elif file_log is None:
            continue
        elif kind == b"C":
            file_log.places.append((fields[2], f"{shown(fields[0])}:{fields[1]}"))
        elif kind == b"A":
            file_log.assigned[fields[0]] = file_log.places[-1][1]
        elif kind == b"D":
            file_log.defaults[fields[0]] = (fields[1], file_log.places[-1][1])
        elif kind == b"V":
            file_log.values[fields[0]] = (fields[1], fields[2] == "1")
        else:
            file_log.done = True
            yield file_log


def _records(log: bytes) -> Iterator[tuple[bytes, list[str]]]:
    fields = log.split(b"\0")
    position = 0
    while position < len(fields) - 1:
        kind = fields[position]
        count = _FIELDS[kind]
        values = fields[position + 1 : position + 1 + count]
        yield kind, [value.decode(errors="surrogateescape") for value in values]
        position += 1 + count


def is_whole(log: bytes, files: tuple[ConfFile, ...]) -> bool:
    """True when the shell came to the end of the last file."""
    kinds = [kind for kind, _ in _records(log)]
    return kinds.count(b"E") == len(files) and kinds[-1] == b"E"


def complaint(log: bytes, files: tuple[ConfFile, ...], said: str, status: int) -> ConfigError:
    """The error for a shell that ended before the last file was done, with bash's own words."""
    begun = [fields[0] for kind, fields in _records(log) if kind == b"F"]
    file = files[len(begun) - 1].shown if begun else "the .conf files"
    said = said.strip() or f"it ended the shell with status {status} and said nothing"
    return ConfigError(f"{file} failed: {said}")
