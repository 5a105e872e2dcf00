"""`python -m moe_bench summarize RUN`."""

from __future__ import annotations

from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option


@click.command
@click.argument("run", default="latest")
@runs_folder_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(run: str, runs_folder: Path, *, as_json: bool) -> None:
    """Show a run's steady state: speed, loss, memory, expert load, and what qualifies them.

    RUN is a run directory, a run's id or a part of it, or `latest`.
    """
    from moe_bench.results.manifest import locate_run
    from moe_bench.results.summary import summarize

    summary = summarize(locate_run(run, base=runs_folder))
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
        return
    from rich.console import Console

    from moe_bench.results.summary_text import print_summary

    print_summary(summary, Console(highlight=False))
