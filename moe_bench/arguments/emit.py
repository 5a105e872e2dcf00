"""A resolved run as Megatron's argv. Pure."""

from __future__ import annotations

from moe_bench.config.run import ResolvedRun


def argv(run: ResolvedRun) -> tuple[str, ...]:
    """The words for Megatron's parser, each its own argv entry: nothing is quoted or split again."""
    return tuple(word for flag, setting in run.args.items() for word in (flag, *setting.argv))
