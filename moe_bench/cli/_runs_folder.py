"""Where the verbs that read runs look for them, and how a run is named to them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

import moe_bench

DEFAULT_RUNS_FOLDER = Path(moe_bench.__file__).parents[1] / "runs"
"""Where launches write unless OUTPUT_PATH says otherwise."""

runs_folder_option = click.option(
    "--output-path",
    "runs_folder",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="OUTPUT_PATH",
    default=DEFAULT_RUNS_FOLDER,
    help="Folder that holds the run directories; default: OUTPUT_PATH, else the project's runs/.",
)


def called(run_dir: Path, environment: Mapping[str, str]) -> str:
    """The run's id where the verbs find it by that, else its path, as a shell takes it: a .conf may have set OUTPUT_PATH."""
    looked_in = Path(environment.get("OUTPUT_PATH") or DEFAULT_RUNS_FOLDER)
    is_found = looked_in.resolve() == run_dir.parent.resolve()
    return run_dir.name if is_found else shlex.quote(str(run_dir))
