"""`python -m moe_bench runs`."""

from __future__ import annotations

from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option


@click.command
@runs_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(runs_folder: Path, *, as_json: bool) -> None:
    """List runs, newest first: model, state, steps, speed, loss; and sweeps."""
    from moe_bench.results.listing import list_runs, listing_lines
    from moe_bench.results.sweep_record import newest_sweeps

    runs = list_runs(runs_folder)
    if as_json:
        import msgspec

        for run in runs:
            print(msgspec.json.encode(run).decode())
        return
    sweeps = [folder.name for folder in newest_sweeps(runs_folder)]
    if not runs and not sweeps:
        print(f"no runs in {runs_folder} yet; start one with: bash ./interactive_benchmarking.sh")
        return
    for line in listing_lines(runs) if runs else ():
        print(line)
    if sweeps:
        more = f" and {len(sweeps) - _MOST_SWEEPS} more" if len(sweeps) > _MOST_SWEEPS else ""
        print(f"sweeps, for status, summarize and report: {', '.join(sweeps[:_MOST_SWEEPS])}{more}")


_MOST_SWEEPS = 10
