"""`python -m moe_bench report RUN...`."""

from __future__ import annotations

from pathlib import Path

import click

from moe_bench.cli._runs_folder import runs_folder_option


@click.command
@click.argument("runs", nargs=-1, metavar="[RUN...]")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="HTML file to write; default: report.html in the first run's directory.",
)
@runs_folder_option
def command(runs: tuple[str, ...], output: Path | None, runs_folder: Path) -> None:
    """Write one offline HTML page with plots and tables of one run or several."""
    from moe_bench.errors import RecordError
    from moe_bench.results.manifest import locate_run
    from moe_bench.results.report import render_report

    run_dirs = [locate_run(run, base=runs_folder) for run in runs or ("latest",)]
    output = output or run_dirs[0] / "report.html"
    text = render_report(run_dirs)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(
            f"--output {output}: cannot be written: {error.strerror}; name another file"
        ) from error
    print(output)
