"""`python -m moe_bench runs`."""

from __future__ import annotations

from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option


@click.command
@runs_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def command(runs_folder: Path, *, as_json: bool) -> None:
    """List runs, newest first: model, state, steps, speed, loss."""
    from moe_bench.results.listing import list_runs, listing_table

    runs = list_runs(runs_folder)
    if as_json:
        import msgspec

        for run in runs:
            print(msgspec.json.encode(run).decode())
        return
    if not runs:
        print(f"no runs in {runs_folder} yet; start one with: bash ./interactive_benchmarking.sh")
        return
    from rich.console import Console

    Console(highlight=False).print(listing_table(runs))
