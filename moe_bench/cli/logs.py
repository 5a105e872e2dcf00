"""`python -m moe_bench logs RUN`: what the ranks said, and what their failure means."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from moe_bench.cli._launching import PROJECT
from moe_bench.cli._runs_folder import runs_folder_option
from moe_bench.cli._triage import rules_in_force
from moe_bench.errors import RecordError
from moe_bench.launch.job import submissions
from moe_bench.launch.status import find_failure, first_failing_log
from moe_bench.results.manifest import locate_run
from moe_bench.results.triage import Diagnosis, diagnose

_RANK = re.compile(r"rank-(\d+)\.log\Z")


@click.command(short_help="Show what a run's ranks said.")
@click.argument("run")
@click.option(
    "--rank",
    type=int,
    help="Only this rank; otherwise the job's log and the first failing or the last rank's.",
)
@click.option("--lines", default=40, show_default=True, help="Last lines of each file; 0 for all.")
@runs_folder_option
def command(run: str, rank: int | None, lines: int, runs_folder: Path) -> None:
    """Show the logs of RUN (its directory, its id, part of the id, or `latest`)."""
    run_dir = locate_run(run, base=runs_folder)
    everything = _from_pods(run_dir, lines) if rank is None else None
    if everything is None:
        everything = _from_files(run_dir, rank, lines)
    if found := diagnose(everything, rules_in_force()) or _of_others(run_dir, rank):
        click.echo(f"\n{found.name}: {found.line}\n  {found.what_to_do}")


def _of_others(run_dir: Path, rank: int | None) -> Diagnosis | None:
    """What logs that were not shown tell, where no rank was chosen."""
    failure = find_failure(run_dir, rules_in_force()) if rank is None else None
    return failure.diagnosis if failure else None


def _from_files(run_dir: Path, rank: int | None, lines: int) -> list[str]:
    everything: list[str] = []
    for path in _chosen(run_dir, rank):
        text = path.read_text(errors="replace").splitlines()
        everything += text
        click.echo(f"==> {path} <==")
        click.echo("\n".join(text[-lines:] if lines else text))
    return everything


def _from_pods(run_dir: Path, lines: int) -> list[str] | None:
    """What Kubernetes has, where the run's files are on a volume that is not seen here; None otherwise."""
    submitted = submissions(run_dir)
    if not submitted or submitted[-1].launcher != "kubernetes" or submitted[-1].job_id is None:
        return None
    if any((run_dir / "logs").glob("*.log")):
        return None
    from moe_bench.launch.kubernetes import KubernetesLauncher

    launcher = KubernetesLauncher(project=PROJECT, python=sys.executable)
    text = launcher.logs(submitted[-1].job_id, lines=lines)
    click.echo(text, nl=False)
    return text.splitlines()


def _chosen(run_dir: Path, rank: int | None) -> list[Path]:
    folder = run_dir / "logs"
    logs = sorted(folder.glob("*.log"))
    ranks = {int(match[1]): path for path in logs if (match := _RANK.search(path.name))}
    if rank is None:
        chosen = [path for path in logs if path not in ranks.values()]
        if ranks:
            failing = first_failing_log(run_dir)
            chosen.append(failing or ranks[max(ranks)])
    else:
        chosen = [ranks[rank]] if rank in ranks else []
    if not chosen:
        wanted = f"rank {rank}" if rank is not None else "the run"
        known = (
            f"; there are ranks {min(ranks)} to {max(ranks)}"
            if ranks
            else "; nothing was written yet"
        )
        raise RecordError(f"{folder}: no log of {wanted}{known}")
    return chosen
