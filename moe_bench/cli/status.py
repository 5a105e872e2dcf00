"""`python -m moe_bench status [RUN]`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option
from moe_bench.cli._triage import rules_in_force
from moe_bench.launch.status import RunStatus, statuses
from moe_bench.results.manifest import RUN_FILE, locate_run, run_dirs
from moe_bench.results.sweep_record import find_sweep, read_sweep
from moe_bench.units import format_duration, format_rate


@click.command(short_help="Say where runs stand: queue, last step, speed, ETA, first failure.")
@click.argument("run", required=False)
@runs_folder_option
@click.option(
    "--most",
    default=20,
    show_default=True,
    help="Newest runs shown when no RUN is named; 0 for all.",
)
def command(run: str | None, runs_folder: Path, most: int) -> None:
    """Show where RUN stands (or each point of a sweep), or the newest runs. Works from files alone where Slurm does not answer."""
    if run is not None:
        chosen = _named(run, runs_folder)
    else:
        found = sorted(
            run_dirs(runs_folder), key=lambda d: (d / RUN_FILE).stat().st_mtime_ns, reverse=True
        )
        chosen = found[:most] if most else found
    if not chosen:
        print(f"no runs in {runs_folder} yet; start one with: bash ./interactive_benchmarking.sh")
        return
    found_statuses, trouble = statuses(chosen, rules_in_force())
    if trouble is not None:
        print(f"moe_bench: {trouble}; telling from files alone", file=sys.stderr)
    for one in found_statuses:
        for line in _lines(one):
            print(line)


def _named(name: str, runs_folder: Path) -> list[Path]:
    """The run, or the points of the sweep, of that name. Raises RecordError."""
    sweep = find_sweep(name, base=runs_folder)
    if sweep is None:
        return [locate_run(name, base=runs_folder)]
    return [sweep / point.name for point in read_sweep(sweep).points]


def _lines(one: RunStatus) -> list[str]:
    parts = [f"{one.run_id}  {one.state}"]
    if one.job_id:
        parts.append(f"job {one.job_id}")
    if one.step is not None:
        parts.append(f"step {one.step}/{one.train_steps}")
    if one.tokens_per_s is not None:
        parts.append(format_rate(one.tokens_per_s))
    if one.eta_s is not None:
        parts.append(f"{format_duration(one.eta_s)} left")
    lines = ["  ".join(parts)]
    if one.why:
        lines.append(f"  {one.why}")
    if one.failure:
        where = f"rank {one.failure.rank}" if one.failure.rank is not None else "job"
        lines.append(f"  {where}: {one.failure.line}")
        if one.failure.diagnosis:
            lines.append(f"  {one.failure.diagnosis.name}: {one.failure.diagnosis.what_to_do}")
    return lines
