"""Megatron's own verdict on one run after another, for the verbs that ask for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bench.errors import MissingExtraError

if TYPE_CHECKING:
    from moe_bench.config.gather import Request
    from moe_bench.config.run import ResolvedRun
    from moe_bench.runtime.preflight import Target

ASSUMED_TE = "2.9.0"
EXAMPLE_GPU = "h100"


def refuse_without_megatron(request: Request, *, needed_for: str) -> None:
    """Raises MissingExtraError where neither this interpreter nor MEGATRON_PATH has what is asked."""
    for package in ("torch", "megatron"):
        has = importlib.util.find_spec(package) is not None
        if not has and not request.environment.get("MEGATRON_PATH"):
            raise MissingExtraError(package, extra="train", needed_for=needed_for)


def target_of(gpu: tuple[str, str], te: tuple[str, str]) -> Target:
    """The machine that Megatron is told of; each with the variable or option that says it. Raises ConfigError."""
    from moe_bench.arguments.lint import checked_version, compute_of

    major, minor = compute_of(*gpu).split(".")
    version = checked_version(*te)
    from moe_bench.runtime.preflight import Target

    return Target(compute=(int(major), int(minor)), transformer_engine=version)


def prepare(request: Request) -> tuple[str, str]:
    """Import Megatron, once a process: the embedding's line for the log, and Megatron's version."""
    from moe_bench.runtime import preflight

    path = request.environment.get("MEGATRON_PATH")
    return preflight.prepare(Path(path) if path else None)


def asker(request: Request) -> Callable[[ResolvedRun], str | None]:
    """Asks Megatron, imported once, whether it would start a run: why not, or None. Raises MissingExtraError.

    Of a GPU and a Transformer Engine that are not here, GPU_ARCH and TE_VERSION tell, or h100 and 2.9.0.
    """
    from moe_bench.arguments.flags import Flags

    refuse_without_megatron(request, needed_for="--preflight")
    from moe_bench.mcore.preflight import Accepted
    from moe_bench.runtime.preflight import ask

    gpu = request.environment.get("GPU_ARCH") or EXAMPLE_GPU
    te = request.environment.get("TE_VERSION") or ASSUMED_TE
    target = target_of(("GPU_ARCH", gpu), ("TE_VERSION", te))
    _, megatron = prepare(request)
    print(f"moe_bench: asking Megatron-Core {megatron} about each point", file=sys.stderr)

    def check(run: ResolvedRun) -> str | None:
        verdict = ask(run, Flags.of_release(run.knobs).known, target, run.world_size)
        if isinstance(verdict.answer, Accepted):
            return None
        blamed = ", ".join(f"{flag} ({setting.origin.place})" for flag, setting in verdict.blamed)
        about = f"; about {blamed}" if blamed else ""
        return f"Megatron refuses it at rank {verdict.rank}: {verdict.answer.message}{about}"

    return check
