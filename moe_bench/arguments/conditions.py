"""Conditions of lint rules: strict data, decided over a run's facts as true, false or unknown. Nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import msgspec

from moe_bench.arguments.schema import FlagSchema
from moe_bench.config.nearest import nearest
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.errors import ConfigError

VERSIONED = ("te", "torch", "compute")
"""What a run needs beside its flags: versions, and the GPU's compute capability. Each may be unknown."""
_COMPARISON = re.compile(r"\s*(<=|>=|==|<|>)\s*(\d+(?:\.\d+)*)\s*\Z")


class Condition(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"is_": "is", "in_": "in"},
):
    """One condition: a subject (flag, env, says, a version, a package, or any/none of others), and one test of a flag or env."""

    flag: str | None = None
    env: str | None = None
    te: str | None = None
    torch: str | None = None
    compute: str | None = None
    lacks: str | None = None
    """A Python package, as it is imported, that the ranks' interpreter does not have."""
    says: tuple[str, ...] = ()
    """Flags of which the run says one; `--rl-*` is every flag that begins so."""
    any: tuple[Condition, ...] = ()
    none: tuple[Condition, ...] = ()
    is_: bool | Literal["on", "off", "set", "unset"] | None = None
    """YAML reads a bare `on` as true."""
    said: bool | None = None
    in_: tuple[str, ...] | None = None
    not_in: tuple[str, ...] | None = None
    contains: str | None = None
    above: float | str | None = None
    below: float | str | None = None
    not_multiple_of: int | str | None = None
    words_above: int | None = None
    words_differ_from: str | None = None


def unknown_package(name: str) -> None:
    """Where the ranks' interpreter is not this one."""
    del name


TESTS = (
    "is_", "said", "in_", "not_in", "contains", "above", "below", "not_multiple_of", "words_above",
    "words_differ_from",
)  # fmt: skip


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What conditions are decided over."""

    run: ResolvedRun
    schema: FlagSchema
    versions: Mapping[str, str | None]
    """`te`, `torch`, `compute` -> version; None when it cannot be known here."""
    has: Callable[[str], bool | None] = unknown_package
    """Whether the ranks' interpreter has a package; None when it cannot be known here."""
    said: Mapping[str, Setting] = msgspec.field(default_factory=dict)
    """Flags of the run under every spelling of their schema entry."""

    @classmethod
    def of(
        cls,
        run: ResolvedRun,
        schema: FlagSchema,
        versions: Mapping[str, str | None],
        has: Callable[[str], bool | None],
    ) -> Facts:
        """The run's facts."""
        said: dict[str, Setting] = {}
        for flag, setting in run.args.items():
            spec = schema.flags.get(flag)
            for spelling in (
                spec.options if spec is not None and spec.kind != "boolean" else (flag,)
            ):
                said[spelling] = setting
        return cls(run=run, schema=schema, versions=versions, has=has, said=said)

    def words(self, flag: str) -> tuple[str, ...]:
        """What the flag holds: its words, `true` for a switch that is on, the release's default, or nothing."""
        setting = self.said.get(flag)
        if setting is not None:
            return setting.words if setting.words is not None else (setting.value,)
        spec = self.schema.flags.get(flag)
        if spec is None or spec.is_switch or spec.default is None or isinstance(spec.default, dict):
            return ()
        given = spec.default if isinstance(spec.default, list) else [spec.default]
        return tuple(str(one) for one in given)


def decide(condition: Condition, facts: Facts) -> bool | None:  # noqa: PLR0911 - one return a subject
    """Whether the condition holds; None when a version or package it asks for is unknown."""
    if condition.any:
        return _any(decide(one, facts) for one in condition.any)
    if condition.none:
        found = _any(decide(one, facts) for one in condition.none)
        return None if found is None else not found
    if condition.says:
        return bool(said_like((condition,), facts))
    for name in VERSIONED:
        asked = getattr(condition, name)
        if asked is not None:
            version = facts.versions.get(name)
            return None if version is None else matches(version, asked)
    if condition.lacks is not None:
        has = facts.has(condition.lacks)
        return None if has is None else not has
    if condition.env is not None:
        setting = facts.run.env.get(condition.env)
        return _test(
            condition,
            () if setting is None else (setting.value,),
            facts,
            is_said=setting is not None,
        )
    flag = condition.flag or ""
    return _test(condition, facts.words(flag), facts, is_said=flag in facts.said)


def all_hold(conditions: tuple[Condition, ...], facts: Facts) -> bool | None:
    """True when every condition holds, False when one does not, None when only unknown versions or packages stand between."""
    is_known = True
    for one in conditions:
        holds = decide(one, facts)
        if holds is False:
            return False
        is_known = is_known and holds is not None
    return True if is_known else None


@lru_cache(maxsize=4096)
def matches(version: str, asked: str) -> bool:
    """`2.1.0` against `>=2.1,<3`. Letters after the numbers (`2.6.0.dev0`, `2.11.0+cpu`) do not count."""
    return all(_compares(version, part) for part in asked.split(","))


def flags_in(conditions: tuple[Condition, ...]) -> list[str]:
    """Flags that the conditions name, in order, each once."""
    found: dict[str, None] = {}
    for one in conditions:
        if one.flag is not None:
            found[one.flag] = None
        for other in (one.above, one.below, one.not_multiple_of, one.words_differ_from):
            if isinstance(other, str):
                found[other] = None
        found.update(dict.fromkeys(flags_in(one.any)))
        found.update(dict.fromkeys(flags_in(one.none)))
    return list(found)


def said_like(conditions: tuple[Condition, ...], facts: Facts) -> list[str]:
    """Flags of the run that a `says` of the conditions names, in the run's order."""
    patterns = [pattern for one in conditions for pattern in one.says]
    names = frozenset(patterns)
    stems = tuple(pattern[:-1] for pattern in patterns if pattern.endswith("*"))
    return [flag for flag in facts.run.args if flag in names or flag.startswith(stems)]


def variables_in(conditions: tuple[Condition, ...]) -> list[str]:
    """Environment variables that the conditions name."""
    direct = [one.env for one in conditions if one.env is not None]
    return direct + [name for one in conditions for name in variables_in((*one.any, *one.none))]


def patterns_in(conditions: tuple[Condition, ...]) -> list[str]:
    """What `says` of the conditions name: flags, and beginnings of flags with a `*`."""
    direct = [pattern for one in conditions for pattern in one.says]
    return direct + [name for one in conditions for name in patterns_in((*one.any, *one.none))]


def refuse_malformed(condition: Condition, place: str) -> None:
    """Raises ConfigError unless the condition has one subject and one test that fits it."""
    subjects = [
        name
        for name in ("flag", "env", "lacks", *VERSIONED)
        if getattr(condition, name) is not None
    ]
    subjects += [name for name in ("says", "any", "none") if getattr(condition, name)]
    tests = [name.rstrip("_") for name in TESTS if getattr(condition, name) is not None]
    if len(subjects) != 1:
        raise ConfigError(
            f"{place}: a condition is about one of flag, env, says, te, torch, compute, lacks, any, none; found {subjects}"
        )
    wanted = 1 if subjects[0] in ("flag", "env") else 0
    if len(tests) != wanted:
        names = ", ".join(name.rstrip("_") for name in TESTS)
        raise ConfigError(
            f"{place}: {subjects[0]} takes {wanted} test of {names}; found {tests or 'none'}"
        )
    for name in VERSIONED:
        asked = getattr(condition, name)
        if asked is not None:
            refuse_no_range(name, asked, place)
    if condition.lacks is not None and not condition.lacks.isidentifier():
        raise ConfigError(
            f"{place}: lacks: {condition.lacks!r} is no package; write it as it is imported, for example flash_attn"
        )
    for inner in (*condition.any, *condition.none):
        refuse_malformed(inner, place)


def refuse_no_range(name: str, asked: str, place: str) -> None:
    """Raises ConfigError unless the text is a version range."""
    if not all(_COMPARISON.match(part) for part in asked.split(",")):
        raise ConfigError(
            f"{place}: {name}: {asked!r} is no version range; write it like '<2.1' or '>=2.1,<3'"
        )


def known_keys(found: Mapping[str, Any]) -> str | None:
    """What an unknown key of a condition may have meant; None when every key is known."""
    fields = [one.rstrip("_") for one in Condition.__struct_fields__]
    for key in found:
        if key not in fields:
            close = nearest(str(key), fields, count=1)
            return f"{key!r} is no part of a condition" + (
                f"; did you mean {close[0]}?" if close else ""
            )
    return None


def _any(decided: Any) -> bool | None:
    answers = list(decided)
    if True in answers:
        return True
    return None if None in answers else False


def _test(condition: Condition, words: tuple[str, ...], facts: Facts, *, is_said: bool) -> bool:  # noqa: PLR0911 - one return a comparison
    match condition:
        case Condition(is_=True | "on"):
            return words == ("true",)
        case Condition(is_=False | "off"):
            return words != ("true",)
        case Condition(is_="set"):
            return bool(words)
        case Condition(is_="unset"):
            return not words
        case Condition(said=bool(wanted)):
            return is_said == wanted
        case Condition(in_=tuple(accepted)):
            return bool(words) and all(word in accepted for word in words)
        case Condition(not_in=tuple(refused)):
            return not any(word in refused for word in words)
        case Condition(contains=str(part)):
            return part in words or any(part in word for word in words if ":" in word)
    return _number_test(condition, words, facts)


def _number_test(condition: Condition, words: tuple[str, ...], facts: Facts) -> bool:
    if condition.words_above is not None:
        return len(words) > condition.words_above
    if condition.words_differ_from is not None:
        return len(words) != len(facts.words(condition.words_differ_from))
    value = _number(words)
    for bound, holds in ((condition.above, _above), (condition.below, _below)):
        if bound is not None:
            other = _bound(bound, facts)
            return value is not None and other is not None and holds(value, other)
    divisor = _bound(condition.not_multiple_of, facts)
    return False if value is None or not divisor else value % divisor != 0


def _above(value: float, bound: float) -> bool:
    return value > bound


def _below(value: float, bound: float) -> bool:
    return value < bound


def _bound(bound: float | str | None, facts: Facts) -> float | None:
    return _number(facts.words(bound)) if isinstance(bound, str) else bound


def _number(words: tuple[str, ...]) -> float | None:
    if len(words) != 1:
        return None
    try:
        return float(words[0])
    except ValueError:
        return None


def _compares(version: str, part: str) -> bool:
    match = _COMPARISON.match(part)
    if match is None:
        raise ConfigError(f"{part!r} is no version range; write it like '<2.1' or '>=2.1,<3'")
    ours, theirs = _numbers(version), _numbers(match[2])
    width = max(len(ours), len(theirs))
    ours, theirs = ours + (0,) * (width - len(ours)), theirs + (0,) * (width - len(theirs))
    match match[1]:
        case "<":
            return ours < theirs
        case "<=":
            return ours <= theirs
        case ">":
            return ours > theirs
        case ">=":
            return ours >= theirs
    return ours == theirs


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
