"""`python -m moe_bench launch local|slurm|kubernetes|...`: what the two benchmarking scripts hand over to."""

from __future__ import annotations

import functools
import sys

import click

from moe_bench.cli._launching import PROJECT, announce, dry_run, request_of, resolve, say_notes
from moe_bench.cli._runs_folder import called
from moe_bench.errors import LaunchError

_SETTINGS = {
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": ["-h", "--help"],
}
_ABOUT = {
    "slurm": "Submit to Slurm.",
    "kubernetes": "Create on Kubernetes: a Job or JobSet, one pod a node.",
}

_HOW = (
    "WORDS are Megatron's own flags (--flag value) and win over everything. All else is said by variables before the "
    "command: MODEL=Tiny-Qwen3 TP=2 TRAIN_ITERS=50 ...; python -m moe_bench explain lists each with its value; DRY_RUN=1 "
    "prints what would run; docs/launch.md and docs/configuration.md tell more."
)


class LauncherGroup(click.Group):
    """Each launcher is a command: the project's own, those of packages, and any FILE.py:CLASS."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Those with a name of their own."""
        from moe_bench.launch.registry import names

        return list(names())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """`local` watches; every other one submits."""
        run = local if cmd_name == "local" else functools.partial(submit, cmd_name)
        about = "Train on this machine and watch." if cmd_name == "local" else _ABOUT.get(cmd_name)
        words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED)
        return click.Command(
            cmd_name,
            callback=run,
            params=[words],
            context_settings=_SETTINGS,
            help=about or "Submit through a launcher that was added.",
            epilog=_HOW,
        )


@click.command(cls=LauncherGroup, short_help="Start a run: here, or under a scheduler.")
def command() -> None:
    """Start the run that MODEL and the other knobs of the environment describe.

    Besides the launchers below, PATH/TO/FILE.py:CLASS names one of your own. Trailing --flags are Megatron's and win
    over everything; DRY_RUN=1 prints what would run.
    """


def local(words: tuple[str, ...]) -> None:
    """Train on this machine and watch."""
    from moe_bench.launch import directory
    from moe_bench.launch.local import LocalLauncher

    request = request_of(words, local=True)
    run, machine = resolve(request)
    announce(run, request)
    launcher = LocalLauncher(project=PROJECT, python=sys.executable, device=machine.device)
    plan = launcher.render(run)
    say_notes(plan)
    if run.knobs["DRY_RUN"].value == "1":
        dry_run(plan)
        return
    from moe_bench.cli._data_shares import refuse_empty_shares
    from moe_bench.cli._inputs import refuse_missing, refuse_unnamed_tokenizer
    from moe_bench.cli._watching import prepare_demo_corpus, watch

    prepare_demo_corpus(run, project=PROJECT)
    refuse_missing(run, PROJECT)
    refuse_empty_shares(run, PROJECT)
    refuse_unnamed_tokenizer(run)
    directory.create(run, plan)
    sys.exit(watch(plan, run))


def submit(name: str, words: tuple[str, ...]) -> None:
    """Render, store and submit through the launcher of that name. Raises MoeBenchError."""
    from moe_bench.launch import directory, registry
    from moe_bench.launch.job import record_refusal, record_submission

    request = request_of(words, local=False, must_name=True)
    name = registry.canonical(name)
    launcher = registry.load(name, project=PROJECT, python=sys.executable)
    run, _ = resolve(request)
    announce(run, request)
    plan = launcher.render(run)
    say_notes(plan)
    if run.knobs["DRY_RUN"].value == "1":
        dry_run(plan)
        return
    from moe_bench.arguments.image import in_image
    from moe_bench.cli._data_shares import refuse_empty_shares
    from moe_bench.cli._inputs import refuse_unnamed_tokenizer

    refuse_unnamed_tokenizer(run)
    if name == "slurm":  # a pod's paths are those of its volumes
        mounts = run.knob("CONTAINER_MOUNTS") if in_image(run) else ""
        refuse_empty_shares(run, PROJECT, mounts=mounts)
    directory.create(run, plan)
    try:
        handle = launcher.submit(plan, run)
    except LaunchError as error:
        record_refusal(run.run_dir, plan, str(error))
        raise
    record_submission(run.run_dir, plan, handle, launcher=name)
    print(f"submitted job {handle.job_id}")
    print(f"run directory {run.run_dir}")
    print(f"watch it with: python -m moe_bench status {called(run.run_dir, request.environment)}")
