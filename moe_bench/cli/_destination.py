"""Where a run that a verb only describes would go: it is resolved as what starts it there would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from moe_bench.cli._launching import request_of, with_model
from moe_bench.config.gather import DEFAULT_CLUSTER, DEFAULT_MODEL, Request
from moe_bench.config.sources import process_environment

destination_option = click.option(
    "--here/--cluster",
    "here",
    default=None,
    help="As interactive_benchmarking.sh would run it on this machine, or as sbatch_benchmarking.sh would submit it. "
    "Default: submitted where CLUSTER (other than local) or LAUNCHER says so, else a Tiny model, REHEARSE=1 and "
    "MOE_BENCH_DEVICE here, and any other model on a cluster.",
)


def request_described(words: Sequence[str], *, here: bool | None, model: str = "") -> Request:
    """The caller's wish. `model`: the verb's own word, above the environment's."""
    environment = process_environment()
    if model:
        environment = {**environment, "MODEL": model}
    local = _is_for_this_machine(environment) if here is None else here
    is_named = any(environment.get(name) for name in ("CLUSTER", "LAUNCHER"))
    request = request_of(words, local=local, must_name=not local and (here is False or is_named))
    return with_model(request, model) if model else request


def destination(request: Request) -> str:
    """In words."""
    if request.local:
        return "on this machine"
    return "as it would be submitted" if request.must_name else "on a cluster with an image"


def _is_for_this_machine(environment: Mapping[str, str]) -> bool:
    if environment.get("REHEARSE") == "1":
        return True
    if launcher := environment.get("LAUNCHER"):
        return launcher == "local"
    if (environment.get("CLUSTER") or DEFAULT_CLUSTER) != DEFAULT_CLUSTER:
        return False
    model = environment.get("MODEL") or DEFAULT_MODEL
    return model.startswith("Tiny-") or bool(environment.get("MOE_BENCH_DEVICE"))
