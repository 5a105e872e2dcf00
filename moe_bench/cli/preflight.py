"""`python -m moe_bench preflight`: ask Megatron itself whether it would start, for the whole job, on this machine."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from moe_bench.cli._launching import request_of, with_model
from moe_bench.cli._preflighting import (
    ASSUMED_TE,
    EXAMPLE_GPU,
    prepare,
    refuse_without_megatron,
    target_of,
)
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import MoeBenchError

if TYPE_CHECKING:
    from moe_bench.config.gather import Request
    from moe_bench.mcore.preflight import Accepted
    from moe_bench.runtime.preflight import Target, Verdict


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
    "--arch", default=EXAMPLE_GPU, show_default=True, help="GPU that Megatron is told of."
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
    refuse_without_megatron(request, needed_for="preflight")
    target = target_of(("--arch", arch), ("--te", te_version))
    runs = {name: _resolved(name, request) for name in _models(models, request, every=every)}
    refused = 0
    for name, run in runs.items():
        if isinstance(run, MoeBenchError):
            print(f"{name}: REFUSED before Megatron is asked: {run}")
            refused += 1
    left = {name: run for name, run in runs.items() if isinstance(run, ResolvedRun)}
    if left:
        _load(request, arch, target)
    for name, run in left.items():
        refused += _told(name, _verdict(run, target, world_size), target)
    sys.exit(2 if refused else 0)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def _models(models: tuple[str, ...], request: Request, *, every: bool) -> list[str]:
    from moe_bench.config.gather import DEFAULT_MODEL, MODELS

    if every:
        return sorted(path.stem for path in (request.project / MODELS).glob("*.yaml"))
    return list(models) or [request.environment.get("MODEL") or DEFAULT_MODEL]


def _load(request: Request, arch: str, target: Target) -> None:
    started = time.perf_counter()
    embedding, megatron = prepare(request)
    _say(embedding)
    compute = ".".join(map(str, target.compute))
    assumed = _assumed_te(target.transformer_engine)
    _say(f"assumed: {arch} GPUs (compute capability {compute}){assumed}")
    _say(f"Megatron-Core {megatron} loaded in {time.perf_counter() - started:.1f} s")


def _assumed_te(version: str) -> str:
    from moe_bench.mcore.preflight import transformer_engine_is_here

    if transformer_engine_is_here():
        return ""
    return f", Transformer Engine {version} (none is installed here: its version probes answer, nothing is computed)"


def _verdict(run: ResolvedRun, target: Target, world_size: int | None) -> Verdict:
    from moe_bench.arguments.flags import Flags
    from moe_bench.runtime.preflight import ask

    return ask(run, Flags.of_release(run.knobs).known, target, world_size or run.world_size)


def _resolved(name: str, request: Request) -> ResolvedRun | MoeBenchError:
    from moe_bench.arguments.resolve import Identity, resolve_run
    from moe_bench.config.machine import probe

    asked = request if name == request.environment.get("MODEL") else with_model(request, name)
    identity = Identity(run_id=f"{name}-preflight")
    try:
        return resolve_run(asked, probe(asked.environment), identity)
    except MoeBenchError as error:
        return error


def _told(name: str, verdict: Verdict, target: Target) -> bool:
    """Print one verdict; True when it is a refusal."""
    from moe_bench.mcore.preflight import Accepted

    if isinstance(verdict.answer, Accepted):
        print(f"{name}: OK  {_layout(verdict, verdict.answer)}  {verdict.seconds:.2f} s")
        return False
    print(
        f"{name}: REFUSED by Megatron at rank {verdict.rank} of {verdict.world_size}: {verdict.answer.message}"
    )
    print(f"    at {verdict.answer.where}")
    for flag, setting in verdict.blamed:
        print(f"    {setting.spelled(flag)}  ({setting.origin.place})")
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
