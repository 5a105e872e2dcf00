"""Megatron's own verdict on one run after another, for verbs that ask about many."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bench.cli.preflight import ASSUMED_TE
from moe_bench.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from moe_bench.config.gather import Request
    from moe_bench.config.run import ResolvedRun


def asker(request: Request) -> Callable[[ResolvedRun], str | None]:
    """Asks Megatron, imported once, whether it would start a run: why not, or None. Raises MissingExtraError.

    Of a GPU and a Transformer Engine that are not here, GPU_ARCH and TE_VERSION tell, or h100 and 2.9.0.
    """
    from moe_bench.arguments.flags import Flags
    from moe_bench.arguments.lint import COMPUTE_OF

    path = request.environment.get("MEGATRON_PATH")
    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None and not path:
            raise MissingExtraError(package, extra="train", needed_for="--preflight")
    from moe_bench.mcore.preflight import Accepted
    from moe_bench.runtime.preflight import Target, ask, prepare

    arch = (request.environment.get("GPU_ARCH") or "h100").lower()
    if arch not in COMPUTE_OF:
        raise ConfigError(f"GPU_ARCH={arch} (environment) is not one of {', '.join(COMPUTE_OF)}")
    major, minor = COMPUTE_OF[arch].split(".")
    te = request.environment.get("TE_VERSION") or ASSUMED_TE
    target = Target(compute=(int(major), int(minor)), transformer_engine=te)
    _, megatron = prepare(Path(path) if path else None)
    print(f"moe_bench: asking Megatron-Core {megatron} about each point", file=sys.stderr)

    def check(run: ResolvedRun) -> str | None:
        verdict = ask(run, Flags.of_release(run.knobs).known, target, run.world_size)
        if isinstance(verdict.answer, Accepted):
            return None
        blamed = ", ".join(f"{flag} ({setting.origin.place})" for flag, setting in verdict.blamed)
        about = f"; about {blamed}" if blamed else ""
        return f"Megatron refuses it at rank {verdict.rank}: {verdict.answer.message}{about}"

    return check
