"""`python -m moe_bench cancel RUN`: stop a run, wherever it was submitted."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_bench.cli._launching import PROJECT
from moe_bench.cli._runs_folder import runs_folder_option
from moe_bench.errors import LaunchError
from moe_bench.launch import registry
from moe_bench.launch.job import record_cancellation, submissions
from moe_bench.results.manifest import locate_run


@click.command(short_help="Stop a submitted run.")
@click.argument("run")
@runs_folder_option
def command(run: str, runs_folder: Path) -> None:
    """Cancel RUN (its directory, its id, part of the id, or `latest`)."""
    run_dir = locate_run(run, base=runs_folder)
    submitted = submissions(run_dir)
    if not submitted:
        raise LaunchError(
            f"{run_dir} was never submitted; a local run is stopped with Ctrl-C in its terminal"
        )
    last = submitted[-1]
    if last.job_id is None:
        raise LaunchError(f"{run_dir} never became a job: {last.refused}")
    launcher = registry.load(last.launcher, project=PROJECT, python=sys.executable)
    entry = launcher.query([last.job_id]).get(last.job_id)
    if entry is not None and entry.ended:
        click.echo(f"job {last.job_id} is over already: {entry.state}")
        return
    launcher.cancel(last.job_id)
    record_cancellation(run_dir)
    click.echo(f"job {last.job_id} cancelled")
