"""`python -m moe_bench preflight`: ask Megatron itself whether it would start, for the whole job, on this machine."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_bench.cli._launching import request_of
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import ConfigError, MissingExtraError, MoeBenchError

if TYPE_CHECKING:
    from moe_bench.config.gather import Request
    from moe_bench.mcore.preflight import Accepted
    from moe_bench.runtime.preflight import Target, Verdict

ASSUMED_TE = "2.9.0"
_EXAMPLE_GPU = "h100"


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Ask Megatron itself, for the whole job, here.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    help="Ranks of the job; default: NNODES x GPUS_PER_NODE.",
)
@click.option(
    "--arch", default=_EXAMPLE_GPU, show_default=True, help="GPU that Megatron is told of."
)
@click.option(
    "--te",
    "te_version",
    default=ASSUMED_TE,
    show_default=True,
    help="Transformer Engine assumed where none is installed.",
)
@click.option("--all", "every", is_flag=True, help="Every model of model_configs/benchmarking.")
@click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL]... [--MEGATRON-FLAG VALUE]..."
)
def command(
    world_size: int | None, arch: str, te_version: str, every: bool, words: tuple[str, ...]
) -> None:
    """Run Megatron's own parser, validation and model configuration for the first, a middle and the last rank of the job.

    No GPU and no job are needed, whatever the world size. MODEL defaults to the environment's; the other knobs and
    trailing Megatron flags work as for a launch.
    """
    models, flags = _split(words)
    request = request_of(flags, local=False)
    names = _models(models, request, every=every)
    target, verdicts = _asked(names, request, arch, te_version, world_size)
    refused = sum(_told(name, verdict, target) for name, verdict in verdicts)
    sys.exit(2 if refused else 0)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def _models(models: tuple[str, ...], request: Request, *, every: bool) -> list[str]:
    from moe_bench.config.gather import DEFAULT_MODEL, MODELS

    if every:
        return sorted(path.stem for path in (request.project / MODELS).glob("*.yaml"))
    return list(models) or [request.environment.get("MODEL") or DEFAULT_MODEL]


def _asked(
    names: list[str], request: Request, arch: str, te_version: str, world_size: int | None
) -> tuple[Target, Iterator[tuple[str, Verdict | MoeBenchError]]]:
    from moe_bench.arguments.lint import COMPUTE_OF

    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None and not request.environment.get(
            "MEGATRON_PATH"
        ):
            raise MissingExtraError(package, extra="train", needed_for="preflight")
    from moe_bench.runtime.preflight import Target, prepare

    if arch not in COMPUTE_OF:
        raise ConfigError(f"--arch {arch} is not one of {', '.join(COMPUTE_OF)}")
    major, minor = COMPUTE_OF[arch].split(".")
    target = Target(compute=(int(major), int(minor)), transformer_engine=te_version)
    started = time.perf_counter()
    path = request.environment.get("MEGATRON_PATH")
    embedding, megatron = prepare(Path(path) if path else None)
    _say(embedding)
    _say(f"assumed: {arch} GPUs (compute capability {major}.{minor}){_assumed_te(te_version)}")
    verdicts = ((name, _verdict(name, request, target, world_size)) for name in names)
    _say(f"Megatron-Core {megatron} loaded in {time.perf_counter() - started:.1f} s")
    return target, verdicts


def _assumed_te(version: str) -> str:
    from moe_bench.mcore.preflight import transformer_engine_is_here

    if transformer_engine_is_here():
        return ""
    return f", Transformer Engine {version} (none is installed here: its version probes answer, nothing is computed)"


def _verdict(
    name: str, request: Request, target: Target, world_size: int | None
) -> Verdict | MoeBenchError:
    from moe_bench.arguments.flags import Flags
    from moe_bench.runtime.preflight import ask

    try:
        run = _resolved(name, request)
        known = Flags.of_release(run.knobs).known
        return ask(run, known, target, world_size or run.world_size)
    except MoeBenchError as error:
        return error


def _resolved(name: str, request: Request) -> ResolvedRun:
    from moe_bench.arguments.resolve import Identity, resolve_run
    from moe_bench.config.machine import probe

    environment = {"CLUSTER": "local", **request.environment, "MODEL": name}
    asked = replace(request, environment=environment)
    return resolve_run(asked, probe(environment), Identity(run_id=f"{name}-preflight"))


def _told(name: str, verdict: Verdict | MoeBenchError, target: Target) -> bool:
    """Print one verdict; True when it is a refusal."""
    from moe_bench.mcore.preflight import Accepted

    if isinstance(verdict, MoeBenchError):
        print(f"{name}: REFUSED before Megatron is asked: {verdict}")
        return True
    if isinstance(verdict.answer, Accepted):
        print(f"{name}: OK  {_layout(verdict, verdict.answer)}  {verdict.seconds:.2f} s")
        return False
    print(
        f"{name}: REFUSED by Megatron at rank {verdict.rank} of {verdict.world_size}: {verdict.answer.message}"
    )
    print(f"    at {verdict.answer.where}")
    for flag, setting in verdict.blamed:
        value = "" if setting.value == "true" and setting.words is None else f" {setting.value}"
        print(f"    {flag}{value}  ({setting.origin.place})")
    for fix in _fixes(verdict, target):
        print(f"    way out: {fix}")
    return True


def _fixes(verdict: Verdict, target: Target) -> list[str]:
    """What the interaction rules say about the same run."""
    from moe_bench.arguments.flags import Flags
    from moe_bench.arguments.lint import lint

    versions = {
        "te": target.transformer_engine,
        "torch": None,
        "compute": ".".join(map(str, target.compute)),
    }
    found = lint(verdict.run, Flags.of_release(verdict.run.knobs).known, versions)
    return [f"{one.fix} ({one.rule})" for one in found if one.severity == "error"] or [
        "change one of these flags"
    ]


def _layout(verdict: Verdict, answer: Accepted) -> str:
    knobs = verdict.run.knobs
    sizes = " ".join(
        f"{name}{knobs[name].value}"
        for name in ("TP", "PP", "EP", "CP", "ETP", "VPP")
        if name in knobs
    )
    layers = _stages(answer.layers)
    return (
        f"{verdict.world_size} ranks {sizes} DP{answer.data_parallel_size}  "
        f"{answer.num_microbatches} micro-batches  {answer.num_layers} layers{layers}"
    )


def _stages(layers: tuple[tuple[int, ...], ...]) -> str:
    """` = 4 + 14x4 + 1`: layers of each stage, runs of equal stages together; virtual stages in brackets."""
    if len(layers) < 2:
        return ""
    shown = [
        str(stage[0]) if len(stage) == 1 else f"({'+'.join(map(str, stage))})" for stage in layers
    ]
    parts: list[str] = []
    count = 0
    for position, text in enumerate(shown):
        count += 1
        if position + 1 == len(shown) or shown[position + 1] != text:
            parts.append(text if count == 1 else f"{count}x{text}")
            count = 0
    return " = " + " + ".join(parts)


def _say(line: str) -> None:
    print(f"moe_bench: {line}", file=sys.stderr)
