"""A resolved run as text and as JSON, for `explain`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from moe_bench.arguments.flags import Flags
from moe_bench.arguments.schema import FlagSpec
from moe_bench.cli._destination import destination
from moe_bench.config.gather import MODELS, Request
from moe_bench.config.knobs import BOUND, KNOBS
from moe_bench.config.layers import MEANING, PRECEDENCE
from moe_bench.config.nearest import nearest
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.config.sources import names_in
from moe_bench.errors import ConfigError
from moe_bench.secrets import is_secret

_VALUE_WIDTH = 60


def as_text(run: ResolvedRun, keys: Sequence[str], request: Request) -> Iterator[str]:
    """Everything, or the named settings."""
    if keys:
        for key in keys:
            yield from _one(run, key, request)
        return
    yield f"{run.model} {destination(request)}: {run.world_size} ranks, run directory {run.run_dir}"
    yield "precedence, highest first:"
    for layer in PRECEDENCE:
        yield f"  {layer:<12} {MEANING[layer]}"
    for title, group in _groups(run):
        yield ""
        yield f"{title}:"
        yield from _table(group)
    yield from _remarks(run)


def _groups(run: ResolvedRun) -> tuple[tuple[str, Mapping[str, Setting]], ...]:
    return (
        ("knobs", run.knobs),
        ("environment of every rank", run.env),
        ("Megatron's flags, in argv order", run.args),
    )


def _table(group: Mapping[str, Setting]) -> Iterator[str]:
    name_width = max((len(name) for name in group), default=0)
    value_width = min(max((len(_shown(one)) for one in group.values()), default=0), _VALUE_WIDTH)
    for name, setting in group.items():
        yield f"  {name:<{name_width}}  {_shown(setting):<{value_width}}  {setting.origin.place}"
        for lost in setting.overrode:
            yield f"  {'':<{name_width}}  overrode {lost.value or '(empty)'} ({lost.origin.place})"


def _shown(setting: Setting) -> str:
    """On one line: line breaks and other control characters as Python writes them."""
    text = setting.value
    return text if text.isprintable() else repr(text)


def _remarks(run: ResolvedRun) -> Iterator[str]:
    if run.rehearsal:
        yield ""
        yield f"REHEARSAL: a shrunken stand-in, NOT {run.model}"
    if run.substitutions:
        yield ""
        yield "substituted:"
        for one in run.substitutions:
            yield f"  {one.asked} -> {one.used} ({one.reason})"
    for note in run.notes:
        yield f"note: {note}"


def _one(run: ResolvedRun, key: str, request: Request) -> Iterator[str]:
    found = [(title, group[key]) for title, group in _groups(run) if key in group]
    if is_secret(key):
        state = "set" if request.environment.get(key) else "not set"
        yield f"{key} is a secret: {state} in the environment, passed on to the ranks, never written or shown"
    elif found:
        for title, setting in found:
            yield from _told(key, title, setting)
        flag = KNOBS[key].flag if key in KNOBS else None
        if flag is not None and flag in run.args:
            yield from _told(flag, "as Megatron reads it", run.args[flag])
    else:
        yield _unset(run, key)


def _told(name: str, title: str, setting: Setting) -> Iterator[str]:
    about = f": {KNOBS[name].about}" if name in KNOBS else ""
    yield f"{name} = {_shown(setting)}  ({title}{about})"
    yield f"  from      {setting.origin.place}  [{setting.origin.layer}]"
    for lost in setting.overrode:
        yield f"  overrode  {lost.value or '(empty)'}  {lost.origin.place}  [{lost.origin.layer}]"


def _unset(run: ResolvedRun, key: str) -> str:
    if key in KNOBS:
        return f"{key} is not set ({KNOBS[key].about})"
    spec, bound = _spec(run, key), BOUND.get(key)
    knob = f"; {bound} sets it" if bound else ""
    return (
        f"{key} is not set: Megatron-Core's own default is {spec.default if spec else None}{knob}"
    )


def _spec(run: ResolvedRun, key: str) -> FlagSpec | None:
    return Flags.of_release(run.knobs).known.flags.get(key)


def refuse_unknown(run: ResolvedRun, keys: Sequence[str], request: Request) -> None:
    """Raises ConfigError for a name that nothing knows."""
    known = {name for _, group in _groups(run) for name in group} | KNOBS.keys()
    for key in keys:
        if key in known or is_secret(key) or _spec(run, key) is not None:
            continue
        if key in names_in(request.project / MODELS, ".yaml"):
            raise ConfigError(f"{key} is a model; write MODEL={key} python -m moe_bench explain")
        guess = nearest(key, sorted(known))
        hint = f"; did you mean {' or '.join(guess)}?" if guess else ""
        raise ConfigError(
            f"{key!r} is no knob, no flag of this release and no variable of this run{hint}"
        )


def to_json(run: ResolvedRun, keys: Sequence[str]) -> str:
    """Precedence, then each group by name: value, words, origin, overrode."""
    wanted = set(keys)
    found: dict[str, object] = {
        "model": run.model,
        "run_id": run.run_id,
        "run_dir": str(run.run_dir),
    }
    found["precedence"] = list(PRECEDENCE)
    for name, group in (("knobs", run.knobs), ("env", run.env), ("args", run.args)):
        found[name] = {
            key: asdict(setting) for key, setting in group.items() if not wanted or key in wanted
        }
    found["substitutions"] = [asdict(one) for one in run.substitutions]
    found["notes"] = list(run.notes)
    return json.dumps(found, indent=2)
