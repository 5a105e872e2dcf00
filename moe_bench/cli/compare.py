"""`python -m moe_bench compare RUN RUN [...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option


@click.command
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN [...]")
@runs_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(runs: tuple[str, ...], runs_folder: Path, *, as_json: bool) -> None:
    """Show what differs between runs, and how the others' speed stands to the first's.

    Runs of different models, routing modes or rehearsals are shown but not ranked.
    """
    from moe_bench.results.compare import compare
    from moe_bench.results.manifest import locate_run

    if len(runs) < 2:
        raise click.UsageError("compare needs two runs or more")
    comparison = compare([locate_run(run, base=runs_folder) for run in runs])
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode())
        return
    from rich.console import Console

    from moe_bench.results.compare_text import print_comparison

    # In a file nothing needs to be folded to a terminal's width.
    width = None if sys.stdout.isatty() else 40 + 60 * len(runs)
    print_comparison(comparison, Console(highlight=False, width=width))
