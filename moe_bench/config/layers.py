"""Fold what the layers say into one value each, and keep who said what. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from moe_bench.config.run import Origin, Overridden, Setting

PRECEDENCE = (
    "flag",
    "environment",
    "cluster",
    "runtime",
    "common",
    "model",
    "derived",
    "default",
)
"""Highest first. The one list; `explain` prints it.

flag: words after the script's name. environment: variables of the caller. cluster, runtime, common: the bash `.conf` files
(a file that assigns without looking, `export TP=1` in place of `export TP=${TP:-1}`, beats the environment: it is a program,
and `explain` shows what it overrode). model: the YAML of the preset. derived: this project's rules. default: built in.
"""

EXPLICIT = ("flag", "environment")
"""What the caller of this very run wrote."""

MEANING = {
    "flag": "words after the script's name (--flag value)",
    "environment": "variables of the caller's environment",
    "cluster": "cluster_configs/benchmarking/$CLUSTER.conf",
    "runtime": "runtime_configs/benchmarking/runtime.conf",
    "common": "runtime_configs/benchmarking/common.conf",
    "model": "model_configs/benchmarking/$MODEL.yaml",
    "derived": "rules of moe_bench/arguments",
    "default": "built in",
}
"""What each layer is, for `explain`."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer says about one name."""

    name: str
    value: str
    origin: Origin
    words: tuple[str, ...] | None = None
    """As in Setting."""


def fold(candidates: Iterable[Candidate]) -> dict[str, Setting]:
    """The winner of each name, with its losers. Names keep the order of their first mention; ties go to the later one."""
    by_name: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_name.setdefault(candidate.name, []).append(candidate)
    return {name: _winner(said) for name, said in by_name.items()}


def _winner(said: list[Candidate]) -> Setting:
    if len(said) == 1:
        return Setting(value=said[0].value, origin=said[0].origin, words=said[0].words)
    order = sorted(
        range(len(said)), key=lambda index: (PRECEDENCE.index(said[index].origin.layer), -index)
    )
    ranked = [said[index] for index in order]
    best = ranked[0]
    losers = tuple(
        Overridden(value=one.value, origin=one.origin)
        for one in ranked[1:]
        if one.value != best.value
    )
    return Setting(value=best.value, origin=best.origin, overrode=losers, words=best.words)
