"""`python -m moe_bench dashboard show|apply`: the W&B workspace with the panels that the mirror fills."""

from __future__ import annotations

from pathlib import Path

import click

from moe_bench.config.sources import process_environment
from moe_bench.errors import LaunchError

_FILE = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Your own description; default: the one that `show` prints.",
)


@click.group(short_help="Show the W&B dashboard, or make it in a project.")
def command() -> None:
    """The W&B dashboard of a project."""


@command.command()
@_FILE
@click.option("--json", "as_json", is_flag=True, help="What `apply` would send, as W&B's JSON.")
def show(path: Path | None, *, as_json: bool) -> None:
    """Print the description; nothing is sent."""
    from moe_bench.results.dashboard import BUILTIN, read_dashboard, specification, workspace

    dashboard = read_dashboard(path or BUILTIN)
    if not as_json:
        click.echo((path or BUILTIN).read_text(), nl=False)
        return
    made = workspace(dashboard, entity="ENTITY", project="PROJECT")
    click.echo(specification(made).decode())


@command.command()
@click.argument("target", metavar="ENTITY/PROJECT")
@_FILE
def apply(target: str, path: Path | None) -> None:
    """Make the workspace in ENTITY/PROJECT, with the key of WANDB_API_KEY or `wandb login`."""
    from moe_bench.results.dashboard import BUILTIN, read_dashboard, save, workspace

    entity, slash, project = target.partition("/")
    if not slash or not entity or not project or "/" in project:
        raise LaunchError(f"{target!r} is not ENTITY/PROJECT; for example my-team/moe-benchmarking")
    made = workspace(read_dashboard(path or BUILTIN), entity=entity, project=project)
    print(f"saved: {save(made, environment=process_environment())}")
