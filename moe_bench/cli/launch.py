"""`python -m moe_bench launch local|slurm`: what the two benchmarking scripts hand over to."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moe_bench.cli._launching import announce, dry_run, request_of, resolve
from moe_bench.errors import LaunchError

_SETTINGS = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
_WORDS = click.argument("words", nargs=-1, type=click.UNPROCESSED)


@click.group(short_help="Start a run: here, or under a scheduler.")
def command() -> None:
    """Start the run that MODEL and the other knobs of the environment describe.

    Trailing --flags are Megatron's and win over everything; DRY_RUN=1 prints what would run.
    """


@command.command(context_settings=_SETTINGS)
@_WORDS
def local(words: tuple[str, ...]) -> None:
    """Train on this machine and watch."""
    from moe_bench.launch import directory
    from moe_bench.launch.local import LocalLauncher

    request = request_of(words, local=True)
    run, machine = resolve(request)
    announce(run, request)
    launcher = LocalLauncher(project=request.project, python=sys.executable, device=machine.device)
    plan = launcher.render(run)
    if run.knobs["DRY_RUN"].value == "1":
        dry_run(plan)
        return
    from moe_bench.cli._watching import prepare_demo_corpus, watch

    prepare_demo_corpus(run, project=request.project)
    directory.create(run, plan)
    sys.exit(watch(plan, run))


@command.command(context_settings=_SETTINGS)
@_WORDS
def slurm(words: tuple[str, ...]) -> None:
    """Submit to Slurm."""
    from moe_bench.launch import directory
    from moe_bench.launch.job import record_refusal, record_submission
    from moe_bench.launch.slurm import SlurmLauncher

    request = request_of(words, local=False, must_name=True)
    run, _ = resolve(request)
    announce(run, request)
    launcher = SlurmLauncher(workspace=request.project, python=sys.executable)
    plan = launcher.render(run)
    if run.knobs["DRY_RUN"].value == "1":
        dry_run(plan)
        return
    directory.create(run, plan)
    try:
        handle = launcher.submit(plan, run)
    except LaunchError as error:
        record_refusal(run.run_dir, plan, str(error))
        raise
    record_submission(run.run_dir, plan, handle)
    _say_submitted(handle.job_id, run.run_dir)


def _say_submitted(job_id: str, run_dir: Path) -> None:
    print(f"submitted job {job_id}")
    print(f"run directory {run_dir}")
    print(f"watch it with: python -m moe_bench status {run_dir.name}")
