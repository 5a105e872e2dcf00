"""What a failure's own words mean, and what to do next. Rules are data: text in, diagnosis out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError

BUILTIN = Path(__file__).parent / "triage_rules.yaml"
PROJECT_RULES = "triage_rules"
"""Folder of the project that may hold more `*.yaml`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """A named kind of failure."""

    name: str
    what_to_do: str
    line: str
    """The line that told it."""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of failure."""

    name: str
    pattern: str
    """A regular expression; letter case is ignored."""
    what_to_do: str
    source: str = ""
    """Where the words come from."""

    @property
    def compiled(self) -> re.Pattern[str]:
        """The pattern, ready to search."""
        return _compiled(self.pattern)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.MULTILINE)


_ERROR_WORDS = (
    *("error", "exception", "assert", "killed", "fatal", "cancelled", "time limit"),
    "unrecognized option",
)
"""In lower case; a line that holds one reads like an error."""


@functools.cache
def read_rules(path: Path = BUILTIN) -> tuple[Rule, ...]:
    """In the file's order. Raises RecordError naming the file and the rule that is none."""
    try:
        rules = msgspec.yaml.decode(path.read_bytes(), type=tuple[Rule, ...])
    except OSError as error:
        raise RecordError(f"{path}: the rules cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise RecordError(
            f"{path}: {error}; rules are a list, each with name, pattern, what_to_do and, if you like, source"
        ) from error
    for rule in rules:
        try:
            _compiled(rule.pattern)
        except re.error as error:
            raise RecordError(
                f"{path}: rule {rule.name!r}: pattern {rule.pattern!r} is no regular expression: {error}"
            ) from error
    return rules


def all_rules(project: Path, more: str = "") -> tuple[Rule, ...]:
    """The user's rules, then the builtin ones, of which a user's takes the place of its namesake. Raises RecordError.

    Args:
        project: Holds `triage_rules/*.yaml`, or does not.
        more: Further files, MOE_BENCH_TRIAGE's `a.yaml:b.yaml`.
    """
    named = [Path(part) for part in more.split(":") if part]
    own: dict[str, Rule] = {}
    for path in (*sorted((project / PROJECT_RULES).glob("*.yaml")), *named):
        own |= {rule.name: rule for rule in read_rules(path)}
    return (*own.values(), *(rule for rule in read_rules() if rule.name not in own))


def diagnose(lines: Iterable[str], rules: Sequence[Rule]) -> Diagnosis | None:
    """The most telling kind found anywhere in `lines`; None when nothing is known. `rules`: `all_rules` has them."""
    text = "\n".join(line.strip() for line in lines)
    for rule in rules:
        # One search of the whole is many times quicker than one a line; a match across lines counts for none of them.
        for match in rule.compiled.finditer(text):
            line = _line_at(text, match.start())
            if rule.compiled.search(line):
                return Diagnosis(name=rule.name, what_to_do=rule.what_to_do, line=line[:400])
    return None


def last_error_line(lines: Iterable[str]) -> str | None:
    """The last line that reads like an error; None when there is none."""
    text = "\n".join(lines)
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is longer would shift what follows it
        lowered = text
    last = max(lowered.rfind(word) for word in _ERROR_WORDS)
    return None if last < 0 else _line_at(text, last).strip()[:400]


def without_ignored(lines: Iterable[str]) -> Iterator[str]:
    """`lines` less the tracebacks of what Python says it ignored: finalizers of objects that a failure left half-made."""
    ignoring = False
    for line in lines:
        if line.startswith("Exception ignored in"):
            ignoring = True
        elif not ignoring:
            yield line
        elif not line.startswith((" ", "\t", "Traceback")):
            ignoring = False  # the exception itself


def _line_at(text: str, position: int) -> str:
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[begin : end if end >= 0 else None]
