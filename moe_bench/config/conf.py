"""What the `.conf` files did, read from the log that `conf.sh` writes. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

import msgspec

from moe_bench.config.run import Origin, Overridden, Setting
from moe_bench.errors import ConfigError

_FIELDS = {b"P": 0, b"F": 1, b"A": 1, b"C": 3, b"D": 2, b"V": 1, b"E": 0, b"X": 1}
_QUOTED = rb'"(?:[^"\\]|\\.)*"|\$\'(?:[^\'\\]|\\.)*\''
_DECLARATION = re.compile(
    rb"declare -(\S+) (\w+)(?:=(%s|\((?:[^\"'()\\]|\\.|%s)*\)))?\n" % (_QUOTED, _QUOTED), re.DOTALL
)
_FIRST_ITEM = re.compile(rb"\(\[0\]=(%s)" % _QUOTED, re.DOTALL)
_SHELLS_OWN = re.compile(
    r"__mb_|BASH|(FUNCNAME|DIRSTACK|GROUPS|PIPESTATUS|LINENO|RANDOM|SRANDOM|SECONDS|_)\Z|EPOCH"
)
_ASSIGNED = re.compile(r"(?<![A-Za-z0-9_])([A-Za-z_][A-Za-z0-9_]*)(?:\+?=|:=)")
_WORD = re.compile(r"\w+")

type Record = tuple[bytes, list[bytes]]
type Command = tuple[bytes, bytes, bytes]
"""File, line and text of a command that was run."""


class ConfFile(msgspec.Struct, frozen=True, kw_only=True):
    """One `.conf` to run."""

    path: str
    layer: str
    shown: str
    """The path as messages show it."""


class ConfVariables(msgspec.Struct, frozen=True, kw_only=True):
    """The shell's variables after the last file."""

    settings: Mapping[str, Setting]
    """Every scalar variable; of layer "environment" where no file changed it."""
    exported: frozenset[str]


class ConfLog(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass over the files wrote."""

    records: tuple[Record, ...]
    status: int | None
    """Of the subshell; None when even that was not written."""

    def is_whole(self, files: tuple[ConfFile, ...]) -> bool:
        """True when the shell came to the end of the last file."""
        ends = sum(kind == b"E" for kind, _ in self.records)
        return self.status == 0 and ends == len(files)


class _FileLog(msgspec.Struct, kw_only=True):
    file: ConfFile
    commands: list[Command]
    """In the order run."""
    shown: Callable[[str], str]
    assigned: dict[str, str]
    """name -> place of a command that builds the name it assigns."""
    defaults: dict[str, tuple[str, str]]
    """name -> (value it would have had but for the environment, place)."""
    values: Mapping[str, tuple[str, bool]] = msgspec.field(default_factory=dict)
    done: bool = False

    def place_of(self, name: str) -> str:
        """Where the last command that mentions an assignment to `name` stands; the file alone when none does."""
        if name in self.assigned:
            return self.assigned[name]
        assigning, mentioning = _index(tuple(self.commands))
        command = assigning.get(name) or mentioning.get(name)
        return self.place(command) if command else self.file.shown

    def place(self, command: Command) -> str:
        """Where the command stands."""
        return f"{self.shown(_text(command[0]))}:{_text(command[1])}"


@lru_cache(maxsize=256)
def _index(commands: tuple[Command, ...]) -> tuple[dict[str, Command], dict[str, Command]]:
    """The last command that assigns to a name by name, and the last that holds a word. Many runs share all their commands."""
    assigning: dict[str, Command] = {}
    mentioning: dict[str, Command] = {}
    for command in commands:
        assigned, words = _names_in(_text(command[2]))
        assigning.update(dict.fromkeys(assigned, command))
        mentioning.update(dict.fromkeys(words, command))
    return assigning, mentioning


@lru_cache(maxsize=4096)
def _names_in(command: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a command assigns to by name, and all words in it. Many runs share their commands."""
    return frozenset(_ASSIGNED.findall(command)), frozenset(_WORD.findall(command))


def split(log: bytes) -> list[ConfLog]:
    """One log for each environment, in order; of one that the shell did not come to there is none."""
    found: list[list[Record]] = []
    status: list[int | None] = []
    for kind, fields in _records(log):
        if kind == b"P":
            found.append([])
            status.append(None)
        elif kind == b"X":
            status[-1] = int(fields[0])
        else:
            found[-1].append((kind, fields))
    return [
        ConfLog(records=tuple(records), status=one)
        for records, one in zip(found, status, strict=True)
    ]


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """What one file built and would have defaulted to, as a log tells that was asked to."""

    assigned: dict[str, str]
    defaults: dict[str, tuple[str, str]]


def notes(
    log: ConfLog, files: tuple[ConfFile, ...], shown: Callable[[str], str]
) -> tuple[Notes, ...]:
    """Of each file, for logs of the same files that were not asked to tell."""
    return tuple(
        Notes(assigned=one.assigned, defaults=one.defaults)
        for one in _file_logs(log.records, files, shown)
    )


def variables(
    log: ConfLog,
    files: tuple[ConfFile, ...],
    environment: Mapping[str, str],
    shown: Callable[[str], str],
    noted: tuple[Notes, ...] | None = None,
) -> ConfVariables:
    """Fold the log into settings. `shown` shortens a path for messages; `noted` stands in for what the log does not tell."""
    current: dict[str, Setting] = {
        name: Setting(value=value, origin=_ENVIRONMENT) for name, value in environment.items()
    }
    values: Mapping[str, tuple[str, bool]] = {}
    for index, file_log in enumerate(_file_logs(log.records, files, shown)):
        if noted is not None:
            file_log.assigned = noted[index].assigned
            file_log.defaults = noted[index].defaults
        values = file_log.values
        for name, (value, _) in values.items():
            before = current.get(name)
            if before is not None and before.value == value and name not in file_log.defaults:
                continue
            current[name] = _after_file(name, value, before, file_log)
    exported = frozenset(name for name, (_, is_exported) in values.items() if is_exported)
    settings = {name: current[name] for name in values} if files else current
    return ConfVariables(settings=settings, exported=exported if files else frozenset(current))


_ENVIRONMENT = Origin(layer="environment", place="environment")


def _after_file(name: str, value: str, before: Setting | None, file_log: _FileLog) -> Setting:
    if before is None or before.value != value:
        origin = Origin(layer=file_log.file.layer, place=file_log.place_of(name))
        lost: tuple[Overridden, ...] = ()
        if before is not None and before.value:  # an empty value says nothing
            lost = (Overridden(value=before.value, origin=before.origin), *before.overrode)
        return Setting(value=value, origin=origin, overrode=lost)
    if name in file_log.defaults and file_log.defaults[name][0] != value:
        default, place = file_log.defaults[name]
        loser = Overridden(value=default, origin=Origin(layer=file_log.file.layer, place=place))
        return Setting(value=value, origin=before.origin, overrode=(loser, *before.overrode))
    return before


def _file_logs(
    records: tuple[Record, ...], files: tuple[ConfFile, ...], shown: Callable[[str], str]
) -> Iterator[_FileLog]:
    file_log: _FileLog | None = None
    remaining = iter(files)
    for kind, fields in records:
        if kind == b"F":
            file_log = _FileLog(
                file=next(remaining), commands=[], shown=shown, assigned={}, defaults={}
            )
        elif file_log is None:
            continue
        elif kind == b"C":
            file_log.commands.append((fields[0], fields[1], fields[2]))
        elif kind == b"A":
            file_log.assigned[_text(fields[0])] = file_log.place(file_log.commands[-1])
        elif kind == b"D":
            place = file_log.place(file_log.commands[-1])
            file_log.defaults[_text(fields[0])] = (_text(fields[1]), place)
        elif kind == b"V":
            file_log.values = declared(fields[0])
        else:
            file_log.done = True
            yield file_log


def declared(text: bytes) -> dict[str, tuple[str, bool]]:
    """Name -> (value, whether it is exported) of what `declare -p` printed; an array by its item 0, as `$NAME` reads it."""
    lines = (b"\n" + text).split(_BEGINS)[1:]
    parsed = [_declaration(line) for line in lines]
    if (
        _UNREADABLE in parsed
    ):  # a value with a line that looks like a declaration, from a bash before 5
        parsed = [_of_match(match) for match in _DECLARATION.finditer(text)]
    return {one[0]: (one[1], one[2]) for one in parsed if one is not None}


_BEGINS = b"\ndeclare -"

type _Declared = tuple[str, str, bool] | None
_UNREADABLE: _Declared = ("", "", False)


@lru_cache(maxsize=8192)
def _declaration(line: bytes) -> _Declared:
    """Of one declaration without its first word. Runs of the same files share most of them."""
    match = _DECLARATION.fullmatch(b"declare -" + line.rstrip(b"\n") + b"\n")
    return _UNREADABLE if match is None else _of_match(match)


def _of_match(match: re.Match[bytes]) -> _Declared:
    """Name, value and whether it is exported; None for what has no value, refers to another variable, or is bash's own."""
    attributes, name, value = match.group(1, 2, 3)
    shown = name.decode()
    if value is None or b"n" in attributes or _SHELLS_OWN.match(shown):
        return None
    if value.startswith(b"("):
        first = _FIRST_ITEM.match(value)
        if first is None:
            return None
        value = first[1]
    return shown, _unquoted(value), b"x" in attributes


_ESCAPED = re.compile(rb"\\(?:([0-7]{1,3})|(.))", re.DOTALL)
_CONTROLS = {b"a": b"\a", b"b": b"\b", b"E": b"\x1b", b"e": b"\x1b", b"f": b"\f", b"n": b"\n"}
_CONTROLS |= {b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def _unquoted(value: bytes) -> str:
    """What bash put between quotes: "..." with backslashes before $ ` \" \\, or $'...' with escapes as C has them."""
    if value.startswith(b"$'"):
        value = _ESCAPED.sub(_control, value[2:-1])
    else:
        value = value[1:-1]
        if b"\\" in value:
            value = _ESCAPED.sub(lambda match: match[0][1:], value)
    return _text(value)


def _control(match: re.Match[bytes]) -> bytes:
    if match[1]:
        return bytes([int(match[1], 8)])
    return _CONTROLS.get(match[2], match[2])


def _text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _records(log: bytes) -> Iterator[Record]:
    fields = log.split(b"\0")
    position = 0
    while position < len(fields) - 1:
        kind = fields[position]
        count = _FIELDS[kind]
        yield kind, fields[position + 1 : position + 1 + count]
        position += 1 + count


def complaint(log: ConfLog | None, files: tuple[ConfFile, ...], said: str) -> ConfigError:
    """The error for a shell that ended before the last file was done, with bash's own words."""
    begun = sum(kind == b"F" for kind, _ in log.records) if log else 0
    file = files[begun - 1].shown if begun else "the .conf files"
    status = "" if log is None or log.status is None else f" with status {log.status}"
    ran = [fields for kind, fields in log.records if kind == b"C"] if log else []
    last = f" at line {_text(ran[-1][1])}, {_text(ran[-1][2])!r}," if ran else ""
    ended = f"it ended the shell{status}{last} and said nothing; a .conf is sourced: return leaves it, exit ends everything"
    return ConfigError(f"{file} failed: {said.strip() or ended}")
