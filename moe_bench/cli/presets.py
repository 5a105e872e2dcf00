"""`python -m moe_bench presets`: the models that come with the project, their size and what they need."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from moe_bench.cli._launching import request_of, with_model
from moe_bench.config.sources import process_environment
from moe_bench.errors import MoeBenchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One row."""

    model: str
    total_params: int
    active_params: int
    mtp_params: int
    gflop_per_token: float
    """Forward and backward, at the preset's sequence length."""
    layout: str
    ranks: int
    states_gib: float
    """Estimated weights, gradients and optimizer states of the fullest rank, in GiB; activations not counted."""
    needs: str


@click.command(short_help="List the models, their size, layout and needs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("names", nargs=-1, metavar="[MODEL]...")
def command(names: tuple[str, ...], *, as_json: bool) -> None:
    """List every MODEL, or the ones named."""
    project = request_of((), local=False).project
    found: list[Preset] = []
    refused: list[str] = []
    for name in names or _known(project):
        try:
            found.append(_preset(name, project))
        except MoeBenchError as error:  # one model's; the others are still listed
            refused.append(f"error: {name}: {error}")
    if as_json:
        print(json.dumps([asdict(preset) for preset in found], indent=2))
    elif found:
        print("\n".join([*_table(found), _ABOUT_GIB]))
    print(*refused, sep="\n", end="\n" * bool(refused), file=sys.stderr)
    sys.exit(2 if refused else 0)


_ABOUT_GIB = "GiB: estimated weights, gradients and optimizer states of the fullest rank; activations come on top."


def _known(project: Path) -> list[str]:
    files = (project / "model_configs/benchmarking").glob("*.yaml")
    return sorted(
        (path.stem for path in files), key=lambda name: (name.startswith("Tiny-"), name.lower())
    )


def _preset(name: str, project: Path) -> Preset:
    from moe_bench.arguments.resolve import Identity, resolve_run
    from moe_bench.config.gather import Request
    from moe_bench.config.machine import Machine
    from moe_bench.planner import flops, memory, params

    environment = {"PATH": process_environment().get("PATH", os.defpath), "CLUSTER": "local"}
    request = with_model(
        Request(environment=environment, words=(), project=project, local=False), name
    )
    run = resolve_run(request, Machine(device="cuda", gpus=8, cores=1), Identity(run_id="presets"))
    count = params.count(run.args)
    ranks = run.world_size
    return Preset(
        model=name,
        total_params=count.total,
        active_params=count.active,
        mtp_params=count.mtp,
        gflop_per_token=flops.per_token(run.args) / 1e9,
        layout=" ".join(
            f"{size}{run.knobs[size].value}"
            for size in ("TP", "PP", "VPP", "EP", "CP")
            if size in run.knobs and run.knobs[size].value != "1"
        )
        or "DP",
        ranks=ranks,
        states_gib=max(one.gib for one in memory.states(run)),
        needs=f"a CPU, {ranks} ranks" if name.startswith("Tiny-") else f"{ranks} GPUs",
    )


def _table(presets: list[Preset]) -> list[str]:
    from moe_bench.units import format_count

    rows = [("MODEL", "TOTAL", "ACTIVE", "GFLOP/TOKEN", "LAYOUT", "GiB", "NEEDS")]
    rows += [
        (
            one.model,
            format_count(one.total_params),
            format_count(one.active_params),
            f"{one.gflop_per_token:.3g}",
            one.layout,
            f"{one.states_gib:.3g}",
            one.needs,
        )
        for one in presets
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
