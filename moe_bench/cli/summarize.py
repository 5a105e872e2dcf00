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

    RUN is a run directory, a run's id or a part of it, or `latest`; or a sweep's, whose points are then ranked.
    """
    from moe_bench.results.sweep_record import find_sweep

    sweep = find_sweep(run, base=runs_folder)
    if sweep is None:
        _show_run(run, runs_folder, as_json=as_json)
    else:
        _show_sweep(sweep, as_json=as_json)


def _show_run(run: str, runs_folder: Path, *, as_json: bool) -> None:
    from moe_bench.results.manifest import locate_run
    from moe_bench.results.summary import summarize

    summary = summarize(locate_run(run, base=runs_folder))
    if as_json:
        _print_json(summary)
        return
    from rich.console import Console

    from moe_bench.results.summary_text import print_summary

    print_summary(summary, Console(highlight=False))


def _show_sweep(folder: Path, *, as_json: bool) -> None:
    from moe_bench.results.sweep_summary import summarize_sweep

    summary = summarize_sweep(folder)
    if as_json:
        _print_json(summary)
        return
    from rich.console import Console

    from moe_bench.results.sweep_text import print_sweep

    print_sweep(summary, Console(highlight=False))


def _print_json(summary: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(summary), indent=2).decode())
