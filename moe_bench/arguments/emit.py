"""A resolved run as Megatron's argv. Pure."""

from __future__ import annotations

from moe_bench.config.run import ResolvedRun, Setting


def argv(run: ResolvedRun) -> tuple[str, ...]:
    """The words for Megatron's parser, each its own argv entry: nothing is quoted or split again."""
    return tuple(word for flag, setting in run.args.items() for word in (flag, *words(setting)))


def words(setting: Setting) -> tuple[str, ...]:
    """The words that follow the flag; none for a switch."""
    if setting.words is not None:
        return setting.words
    return () if setting.value == "true" else (setting.value,)
