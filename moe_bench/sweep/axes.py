"""`--vary NAME=VALUE,VALUE`: what a sweep varies, and the points that come of it. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from moe_bench.config.command_line import Flag
from moe_bench.config.knobs import BOUND, KNOBS, check
from moe_bench.config.nearest import nearest
from moe_bench.config.run import Origin, Setting
from moe_bench.errors import ConfigError
from moe_bench.results.sweep_record import Axis
from moe_bench.secrets import is_secret

FIXED: Mapping[str, str] = {
    "CLUSTER": "a sweep is one queue or a few arrays of one cluster",
    "DEPENDENCY": "the order of a sweep's points is its own",
    "DRY_RUN": "it is the whole sweep's",
    "LAUNCHER": "a sweep is one queue or a few arrays of one cluster",
    "MASTER_ADDR": "it is the machine's",
    "MASTER_PORT": "it is the machine's",
    "NODE_RANK": "it is the machine's",
    "OUTPUT_PATH": "each point has a directory of its own in the sweep's",
    "RUN_ID": "each point is named after what varies",
}
"""Knobs that do not vary, and why."""

PLACE = "--vary"


type Known = Callable[[], Collection[str]]


def parse(texts: Sequence[str], known: Known, flags: Iterable[Flag]) -> tuple[Axis, ...]:
    """The axes in order. `known`: tells the names beside the knobs that the run's files read; `flags`: the trailing ones.

    Raises ConfigError for a name nobody reads, an empty list, a value given twice, a name that is set elsewhere.
    """
    if not texts:
        raise ConfigError("nothing varies; say what does: --vary TP=1,2 (as often as needed)")
    axes = tuple(_axis(text, known) for text in texts)
    _refuse_repeated([name for axis in axes for name in axis.names])
    _refuse_said_twice({name for axis in axes for name in axis.names}, flags)
    return axes


def points(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """The product of the axes, the last one fastest."""
    return [
        {
            name: value
            for axis, values in zip(axes, chosen, strict=True)
            for name, value in zip(axis.names, values, strict=True)
        }
        for chosen in itertools.product(*(axis.values for axis in axes))
    ]


def _axis(text: str, known: Known) -> Axis:
    left, equals, right = text.partition("=")
    names = tuple(left.split(","))
    if not equals or not all(names):
        raise ConfigError(f"--vary {text}: write --vary NAME=VALUE,VALUE, for example TP=1,2")
    for name in names:
        _check_name(name, text, known)
    items = split(right, ",")
    if items == [""]:
        raise ConfigError(f"--vary {text}: {left} has no values; write --vary {left}=1,2")
    values = tuple(_values(item, names, text) for item in items)
    for index, chosen in enumerate(values):
        if chosen in values[:index]:
            raise ConfigError(
                f"--vary {text}: {items[index]!r} is there twice; each value makes points of its own, so take one away"
            )
        for name, value in zip(names, chosen, strict=True):
            if name in KNOBS:
                check(name, Setting(value=value, origin=Origin(layer="environment", place=PLACE)))
    return Axis(names=names, values=values)


def _values(item: str, names: tuple[str, ...], text: str) -> tuple[str, ...]:
    parts = [item] if len(names) == 1 else split(item, ":")
    if len(parts) != len(names):
        raise ConfigError(
            f"--vary {text}: {item!r} holds {len(parts)} values for {len(names)} names; "
            f"names that vary together take values joined by ':', as in TP,EP=1:8,2:4"
        )
    if not all(parts):
        raise ConfigError(f"--vary {text}: one of the values is empty; write VALUE,VALUE")
    return tuple(re.sub(r"\\([,:\\])", r"\1", part) for part in parts)


def split(text: str, separator: str) -> list[str]:
    """At each separator that has no backslash before it."""
    return re.split(rf"(?<!\\){re.escape(separator)}", text)


def _check_name(name: str, text: str, known: Known) -> None:
    if name in FIXED:
        raise ConfigError(f"--vary {text}: {name} does not vary within a sweep: {FIXED[name]}")
    if is_secret(name):
        raise ConfigError(f"--vary {text}: {name} is a secret and is written nowhere")
    if name.startswith("--") and len(name) > 2 and name in BOUND:
        return
    if name.startswith("--") or name in KNOBS or name in known():
        return
    guess = nearest(name, [*KNOBS, *known()])
    hint = f"did you mean {' or '.join(guess)}?" if guess else "knobs are upper case, as in TP"
    raise ConfigError(
        f"--vary {text}: {name} is no knob, and no file of this run reads it; {hint} "
        f"(a Megatron flag begins with --: --vary=--lr=1e-3,1e-4)"
    )


def _refuse_repeated(names: list[str]) -> None:
    meaning: dict[str, str] = {}
    for name in names:
        same = BOUND.get(name, name)
        if same in meaning:
            what = "twice" if meaning[same] == name else f"and so does {meaning[same]}, its knob"
            raise ConfigError(f"--vary: {name} varies {what}; put all its values into one --vary")
        meaning[same] = name


def _refuse_said_twice(varied: set[str], flags: Iterable[Flag]) -> None:
    same = {BOUND.get(name, name): name for name in varied}
    for flag in flags:
        name = same.get(BOUND.get(flag.name, flag.name))
        if name is not None:
            raise ConfigError(
                f"{flag.name} {' '.join(flag.words)} (command line) would win over --vary {name}=... "
                "in every point; drop one of the two"
            )
