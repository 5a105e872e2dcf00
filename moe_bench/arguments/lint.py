"""Interaction rules over a resolved run: what works alone and not together. Rules are data; users add their own."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from moe_bench.arguments import compiled
from moe_bench.arguments.conditions import (
    Condition,
    Facts,
    all_hold,
    flags_in,
    known_keys,
    matches,
    patterns_in,
    refuse_malformed,
    refuse_no_range,
    said_like,
    unknown_package,
    variables_in,
)
from moe_bench.arguments.environment import PASSED_ON
from moe_bench.arguments.findings import Finding
from moe_bench.arguments.image import in_image
from moe_bench.arguments.schema import FlagSchema, load, release_lines
from moe_bench.config.knobs import KNOBS
from moe_bench.config.misspelt import within
from moe_bench.config.nearest import nearest
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import ConfigError

BUILTIN = Path(__file__).with_name("lint_rules.yaml")
PROJECT_RULES = "lint_rules"
"""Folder of a project whose *.yaml hold more rules."""
COMPUTE_OF = {
    "a100": "8.0",
    "h100": "9.0",
    "h200": "9.0",
    "b200": "10.0",
    "gb200": "10.0",
    "b300": "10.3",
    "gb300": "10.3",
}
"""GPU -> compute capability (https://developer.nvidia.com/cuda-gpus)."""
_ENTRY = ("MEGATRON_PATH",)
"""Variables whose absence is no mistake to point at."""
_PACKAGES = {"te": "transformer-engine", "torch": "torch"}
_UNKNOWN = {
    "te": "the version of Transformer Engine is unknown here; set TE_VERSION to the container's",
    "torch": "the version of torch is unknown here; set TORCH_VERSION to the container's",
    "compute": "the GPU is unknown here; set GPU_ARCH, for example to h100",
    "lacks": "what the ranks' interpreter has is unknown here",
}


class Rule(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True
):
    """One interaction rule."""

    name: str
    when: tuple[Condition, ...]
    """All must hold for the rule to speak."""
    reason: str
    fix: str
    source: str = ""
    """Upstream file and line, or page, that it rests on."""
    severity: Literal["error", "warning"] = "error"
    megatron: str = ">=0"
    """Releases it is true of: `>=0.14,<0.18`."""
    origin: str = ""
    """The file it was read from; filled in on reading."""


def lint(
    run: ResolvedRun,
    schema: FlagSchema,
    versions: Mapping[str, str | None],
    rules: Iterable[Rule] | None = None,
    has: Callable[[str], bool | None] = unknown_package,
) -> list[Finding]:
    """What the rules find, in their order. A rule that hangs only on an unknown version or package gives a note."""
    facts = Facts.of(run, schema, versions, has)
    found: list[Finding] = []
    for rule in builtin_rules() if rules is None else rules:
        if rule.origin != "builtin":
            found += _idle(rule, schema)
        if not matches(schema.release, rule.megatron):
            continue
        holds = all_hold(rule.when, facts)
        if holds is not False:
            found.append(_finding(rule, facts, is_known=holds is True))
    return [*found, *_of_packages(run, schema, has)]


def _idle(rule: Rule, schema: FlagSchema) -> Iterator[Finding]:
    """A note for each flag that no release has. Raises ConfigError for a knob, and for what is nearly a release's flag."""
    place = f"{rule.origin or 'a rule'} ({rule.name})"
    for name in (*flags_in(rule.when), *variables_in(rule.when), *patterns_in(rule.when)):
        if name in KNOBS and name not in PASSED_ON:
            flag = KNOBS[name].flag
            hint = f"write flag: {flag}" if flag else "ask for the flag or variable that it sets"
            raise ConfigError(
                f"{place}: {name} is a knob, and rules are about what the ranks get; {hint}"
            )
        if not _is_idle(name, rule, schema):
            continue
        close = sorted(flag for flag in _flags_of_all_releases() if within(name, flag, 2))
        if close or not name.startswith("--"):
            hint = f"; did you mean {close[0]}?" if close else "; flags are written --like-this"
            raise ConfigError(f"{place}: no release has a flag {name}{hint}")
        yield Finding(
            severity="note",
            rule=rule.name,
            subject=name,
            place=rule.origin,
            reason="no release has this flag, so the rule cannot speak",
            fix="a checkout in MEGATRON_PATH may have it",
        )


def _is_idle(name: str, rule: Rule, schema: FlagSchema) -> bool:
    is_open = schema.stands_in or bool(schema.unread)  # a checkout whose flags are not all known
    if is_open or name in schema.flags or name in variables_in(rule.when):
        return False
    known = {*schema.flags, *_flags_of_all_releases()}
    return (
        not any(flag.startswith(name[:-1]) for flag in known)
        if name.endswith("*")
        else (name not in known)
    )


@cache
def _flags_of_all_releases() -> frozenset[str]:
    return frozenset(flag for line in release_lines() for flag in load(line).flags)


_MODULES = {"nvidia-modelopt": "modelopt"}
"""Packages that are imported under another name than their own."""


def _of_packages(
    run: ResolvedRun, schema: FlagSchema, has: Callable[[str], bool | None]
) -> Iterator[Finding]:
    """Flags that Megatron's parser has only where a package is installed."""
    for flag, setting in run.args.items():
        spec = schema.flags.get(flag)
        if spec is None or not spec.needs:
            continue
        found = has(_MODULES.get(spec.needs, spec.needs.replace("-", "_")))
        if found:
            continue
        unknown = f", and {_UNKNOWN['lacks']}" if found is None else ""
        yield Finding(
            severity="note" if found is None else "error",
            rule="flag-of-a-package",
            subject=setting.spelled(flag),
            place=setting.origin.place,
            reason=f"Megatron has this flag only where {spec.needs} is installed{unknown}",
            fix=f"install {spec.needs} for the ranks' interpreter or leave the flag out",
        )


@cache
def builtin_rules() -> tuple[Rule, ...]:
    """The rules that come with the project."""
    return compiled.load(BUILTIN, tuple[Rule, ...]) or read_rules(BUILTIN, "builtin")


def all_rules(project: Path, more: str = "") -> tuple[Rule, ...]:
    """Builtin rules, then `lint_rules/*.yaml` of the project, then the files named in MOE_BENCH_RULES (`a.yaml:b.yaml`).

    A later rule of the same name takes the earlier one's place. Raises ConfigError for a file that holds no rules.
    """
    rules = {rule.name: rule for rule in builtin_rules()}
    named = [Path(part) for part in more.split(":") if part]
    for path in (*sorted((project / PROJECT_RULES).glob("*.yaml")), *named):
        rules.update({rule.name: rule for rule in read_rules(path, str(path))})
    return tuple(rules.values())


def versions_here(
    run: ResolvedRun, environment: Mapping[str, str], *, local: bool
) -> dict[str, str | None]:
    """Versions of the machine that will run: TE_VERSION, TORCH_VERSION, GPU_ARCH where set, else, for a local run, what is installed.

    Raises ConfigError for what is no version or no GPU.
    """
    te, torch, gpu = (environment.get(one) for one in ("TE_VERSION", "TORCH_VERSION", "GPU_ARCH"))
    said = {
        "te": checked_version("TE_VERSION", te) if te else None,
        "torch": checked_version("TORCH_VERSION", torch) if torch else None,
        "compute": compute_of("GPU_ARCH", gpu) if gpu else None,
    }
    if _runs_in_this_interpreter(run, local=local):
        for name, package in _PACKAGES.items():
            said[name] = said[name] or _installed(package)
    return said


def packages_here(run: ResolvedRun, *, local: bool) -> Callable[[str], bool | None]:
    """Whether the interpreter of the ranks has a package; answers None unless the run is a local one without an image."""
    return _is_installed if _runs_in_this_interpreter(run, local=local) else unknown_package


def _runs_in_this_interpreter(run: ResolvedRun, *, local: bool) -> bool:
    return local and not in_image(run)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def compute_of(name: str, gpu: str) -> str:
    """The GPU's compute capability, as `9.0`. `name`: the variable or option that says which. Raises ConfigError."""
    if gpu.lower() not in COMPUTE_OF:
        raise ConfigError(f"{_written(name, gpu)} is not one of {', '.join(COMPUTE_OF)}")
    return COMPUTE_OF[gpu.lower()]


def checked_version(name: str, version: str) -> str:
    """The version itself. `name`: the variable or option that says it. Raises ConfigError for what is none."""
    if not _VERSION.match(version):
        raise ConfigError(f"{_written(name, version)} is not a version; write it like 2.9 or 2.9.0")
    return version


def _written(name: str, value: str) -> str:
    return f"{name} {value}" if name.startswith("--") else f"{name}={value} (environment)"


_VERSION = re.compile(r"\d+(\.\d+)*([a-z+.-].*)?\Z")


def _installed(package: str) -> str | None:
    """Version of an installed package by its metadata folder's name: importlib.metadata alone costs 30 ms to import."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    stem = package.replace("-", "_")
    for folder in Path(spec.origin).parents[1].glob(f"{stem}-*.dist-info"):
        return folder.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
    return None


def _finding(rule: Rule, facts: Facts, *, is_known: bool) -> Finding:
    shown, places = _subject(rule, facts)
    unknown = [
        text
        for name, text in _UNKNOWN.items()
        if facts.versions.get(name) is None and _asks(rule.when, name)
    ]
    return Finding(
        severity=rule.severity if is_known else "note",
        rule=rule.name,
        subject=shown,
        place=places,
        reason=rule.reason if is_known else f"{rule.reason}, and {'; '.join(unknown)}",
        fix=rule.fix,
        link=rule.source,
    )


def _asks(conditions: tuple[Condition, ...], name: str) -> bool:
    return any(
        getattr(one, name) is not None or _asks((*one.any, *one.none), name) for one in conditions
    )


def _subject(rule: Rule, facts: Facts) -> tuple[str, str]:
    parts: list[str] = []
    places: dict[str, None] = {}
    for flag in (*flags_in(rule.when), *said_like(rule.when, facts)):
        setting = facts.said.get(flag)
        if setting is not None:
            parts.append(setting.spelled(flag))
            places[setting.origin.place] = None
    for name in variables_in(rule.when):
        variable = facts.run.env.get(name)
        if variable is None and name in _ENTRY:
            continue
        parts.append(f"{name}={variable.value}" if variable is not None else f"{name} unset")
        if variable is not None:
            places[variable.origin.place] = None
    return " with ".join(dict.fromkeys(parts)) or rule.name, ", ".join(places)


@cache
def read_rules(path: Path, origin: str) -> tuple[Rule, ...]:
    """The rules of a YAML file. Raises ConfigError naming the file and the rule that is none."""
    import yaml  # noqa: PLC0415 - the parser loads only when rules do

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        entries = yaml.load(path.read_bytes(), Loader=loader)
    except OSError as error:
        raise ConfigError(f"{path}: the rules cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: rules are a list, each with name, when, reason and fix")
    return tuple(
        _rule(entry, f"{path}: rule {position}", origin)
        for position, entry in enumerate(entries, start=1)
    )


def _rule(entry: object, place: str, origin: str) -> Rule:
    if not isinstance(entry, dict):
        raise ConfigError(f"{place} is not a mapping with name, when, reason and fix")
    place = f"{place} ({entry.get('name', 'without a name')})"
    fields = [name for name in Rule.__struct_fields__ if name != "origin"]
    for key in entry:
        if key not in fields:
            close = nearest(str(key), fields, count=1)
            raise ConfigError(
                f"{place}: {key!r} is no part of a rule"
                + (f"; did you mean {close[0]}?" if close else "")
            )
    for condition in entry.get("when") or []:
        if isinstance(condition, dict) and (wrong := known_keys(condition)) is not None:
            raise ConfigError(f"{place}: {wrong}")
    try:
        rule = msgspec.convert({**entry, "origin": origin}, type=Rule)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{place}: {error}") from error
    if not rule.when:
        raise ConfigError(f"{place}: when is empty, so it would speak about every run")
    refuse_no_range("megatron", rule.megatron, place)
    for condition in rule.when:
        refuse_malformed(condition, place)
    return rule
