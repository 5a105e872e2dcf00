"""What every launch does before it is handed over: resolve, say aloud, dry run or run directory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import moe_bench
from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.config.gather import DEFAULT_MODEL, MODELS, Request
from moe_bench.config.machine import Machine, probe
from moe_bench.config.run import ResolvedRun
from moe_bench.config.sources import process_environment
from moe_bench.errors import ConfigError
from moe_bench.secrets import is_secret

if TYPE_CHECKING:
    from moe_bench.data.demo import DemoRequest
    from moe_bench.launch.launcher import LaunchPlan

_INHERITING = ("local", "slurm")
"""Launchers whose jobs start with the caller's environment; nothing of a secret is in what they render."""
PROJECT = Path(moe_bench.__file__).parents[1]
"""What runs; its presets and .conf files count unless WORKSPACE names another folder."""


def request_of(words: Sequence[str], *, local: bool, must_name: bool = False) -> Request:
    """The caller's wish: environment and trailing words."""
    environment = process_environment()
    return Request(
        environment=environment,
        words=tuple(words),
        project=_workspace(environment),
        code=PROJECT,
        local=local,
        device=probe(environment).device
        if local
        else environment.get("MOE_BENCH_DEVICE") or "cuda",
        must_name=must_name,
        demo_prefix=demo_request(PROJECT, environment).prefix if local else None,
    )


def _workspace(environment: Mapping[str, str]) -> Path:
    """Where presets and .conf files are. Raises ConfigError for a WORKSPACE of another program."""
    said = environment.get("WORKSPACE")
    folder = Path(said).absolute() if said else PROJECT
    if said and not (folder / MODELS).is_dir():
        raise ConfigError(
            f"WORKSPACE={said} (environment) holds no {MODELS}; it names a folder of presets and .conf files: unset it to use "
            f"those of {PROJECT}"
        )
    return folder


def with_model(request: Request, model: str) -> Request:
    """The same for a model that is a word of the command, and not the environment's."""
    return replace(
        request,
        environment={**request.environment, "MODEL": model},
        places={**request.places, "MODEL": "command line"},
    )


def demo_request(project: Path, environment: Mapping[str, str]) -> DemoRequest:
    """The demo corpus of this project: Shakespeare, or the text that MOE_BENCH_CORPUS names, byte by byte."""
    from moe_bench.data.demo import DemoRequest

    corpus = environment.get("MOE_BENCH_CORPUS")
    return DemoRequest(
        output=project / ".cache" / "corpus",
        tokenizer="bytes",
        corpus=Path(corpus) if corpus else None,
    )


def resolve(request: Request) -> tuple[ResolvedRun, Machine]:
    """The complete run, and the machine it was resolved for."""
    machine = probe(request.environment)
    model = request.environment.get("MODEL") or DEFAULT_MODEL
    return resolve_run(request, machine, Identity(run_id=_run_id(request, model))), machine


def _run_id(request: Request, model: str) -> str:
    given = request.environment.get("RUN_ID")
    if not given:
        return f"{model}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    plain = given.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isalnum() and plain.isascii()) or given.startswith("."):
        raise ConfigError(
            f"RUN_ID={given!r} (environment) names a directory; use letters, digits and . _ - only"
        )
    return given


def announce(run: ResolvedRun, request: Request) -> None:
    """Everything a user did not ask for in so many words, on standard error."""
    if not request.environment.get("MODEL"):
        _say(
            f"MODEL is not set: training {DEFAULT_MODEL}, a small model that a CPU trains in minutes"
        )
    if run.rehearsal:
        _say(
            f"REHEARSAL: a shrunken stand-in, NOT {run.model}; its speed and loss say nothing about the real model"
        )
    for one in run.substitutions:
        _say(f"substituted: {one.asked} -> {one.used} ({one.reason})")
    for note in run.notes:
        _say(f"note: {note}")


def say_notes(plan: LaunchPlan) -> None:
    """What the launcher adds, on standard error."""
    for note in plan.notes:
        _say(f"note: {note}")


def dry_run(plan: LaunchPlan) -> None:
    """The script's bytes on standard output and nothing else there; its hash on standard error."""
    sys.stdout.write(plan.script)
    sys.stdout.flush()
    if plan.launcher in _INHERITING:
        masked = " ".join(
            f"{name}=***" for name in sorted(process_environment()) if is_secret(name)
        )
        _say(
            f"the job inherits this shell's environment, secrets too: {masked or 'there are none'}"
        )
    _say(f"dry run: nothing was started or written; sha256 {plan.sha256}")


def _say(line: str) -> None:
    print(f"moe_bench: {line}", file=sys.stderr)
