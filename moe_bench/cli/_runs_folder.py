"""Where the verbs that read runs look for them, and how a run is named to them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import click

import moe_bench
from moe_bench.config.sources import process_environment

_PROJECT = Path(moe_bench.__file__).parents[1]


def runs_folder(environment: Mapping[str, str]) -> Path:
    """Where launches write as far as the environment says: OUTPUT_PATH, which starts in the project's folder, else runs/ of WORKSPACE."""
    said = environment.get("OUTPUT_PATH")
    return _PROJECT / (said or Path(environment.get("WORKSPACE") or _PROJECT).absolute() / "runs")


runs_folder_option = click.option(
    "--output-path",
    "runs_folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=lambda: runs_folder(process_environment()),
    help="Folder that holds the run directories; default: OUTPUT_PATH, else the project's runs/.",
)


def called(run_dir: Path, environment: Mapping[str, str]) -> str:
    """The run's id where the verbs find it by that, else its path, as a shell takes it: a .conf may have set OUTPUT_PATH."""
    is_found = runs_folder(environment).resolve() == run_dir.parent.resolve()
    return run_dir.name if is_found else shlex.quote(str(run_dir))
