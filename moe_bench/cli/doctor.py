"""`python -m moe_bench doctor`: what this machine, container or allocation has, and what to mend."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_bench.config.sources import process_environment
from moe_bench.launch.doctor import examine

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
PATH_KNOBS = ("DATA_PATH", "TOKENIZER_MODEL", "LOAD_PATH", "MEGATRON_PATH")


@click.command(short_help="Say what this machine has, and what to mend.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("runs"), help="Where runs will go."
)
def command(output: Path) -> None:
    """Look at versions, GPUs, Slurm, containers, paths and space. Exits with 1 when there is a problem."""
    variables = process_environment()
    paths = {name: variables[name] for name in PATH_KNOBS if variables.get(name)}
    problems = 0
    for finding in examine(variables, paths=paths, output=output.absolute()):
        click.echo(f"{MARKS[finding.level]} {finding.subject}: {finding.found}")
        if finding.fix:
            click.echo(f"        -> {finding.fix}")
        problems += finding.level == "problem"
    click.echo(f"{problems} problem{'' if problems == 1 else 's'} found")
    sys.exit(1 if problems else 0)
