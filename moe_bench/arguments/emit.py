"""A resolved run as Megatron's argv. Pure."""

from __future__ import annotations

import re

from moe_bench.config.run import ResolvedRun, Setting

_NEGATIVE = re.compile(r"-[0-9]+|-[0-9]*\.[0-9]+")
"""What argparse takes for a value and not for another flag."""


def argv(run: ResolvedRun) -> tuple[str, ...]:
    """The words for Megatron's parser, each its own argv entry: nothing is quoted or split again."""
    return tuple(word for flag, setting in run.args.items() for word in _words(flag, setting))


def _words(flag: str, setting: Setting) -> tuple[str, ...]:
    values = setting.argv
    if len(values) == 1 and values[0].startswith("-") and not _NEGATIVE.fullmatch(values[0]):
        return (f"{flag}={values[0]}",)
    return (flag, *values)
