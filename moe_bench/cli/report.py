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
    """Write one offline HTML page with plots and tables of one run or several, or of sweeps."""
    from moe_bench.errors import RecordError
    from moe_bench.results.sweep_record import find_sweep

    names = runs or ("latest",)
    sweeps = [find_sweep(name, base=runs_folder) for name in names]
    folders = [folder for folder in sweeps if folder is not None]
    if folders and len(folders) < len(names):
        single = next(name for name, folder in zip(names, sweeps, strict=True) if folder is None)
        raise RecordError(
            f"RUN {single!r} is a run and {folders[0].name!r} a sweep: a page shows one kind; make two reports"
        )
    if folders:
        text = _of_sweeps(folders)
    else:
        from moe_bench.results.manifest import locate_run

        folders = [locate_run(name, base=runs_folder) for name in names]
        text = _of_runs(folders)
    output = output or folders[0] / "report.html"
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(
            f"--output {output}: cannot be written: {error.strerror}; name another file"
        ) from error
    print(output)


def _of_sweeps(folders: list[Path]) -> str:
    from moe_bench.results.sweep_report import render_sweeps

    return render_sweeps(folders)


def _of_runs(run_dirs: list[Path]) -> str:
    from moe_bench.results.report import render_report

    return render_report(run_dirs)
