"""The option that says where runs are, shared by the verbs that read them."""

from __future__ import annotations

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
