"""`python -m moe_bench sweep MODEL --vary NAME=VALUES ...`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_bench.cli._launching import request_of
from moe_bench.cli._runs_folder import runs_folder
from moe_bench.errors import ConfigError

if TYPE_CHECKING:
    from moe_bench.launch.local import LocalLauncher
    from moe_bench.launch.slurm import SlurmLauncher
    from moe_bench.results.sweep_record import Sweep
    from moe_bench.results.triage import Rule
    from moe_bench.sweep.plan import Asked, Check, SweepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line says beside MODEL and Megatron's flags."""

    vary: tuple[str, ...]
    on_slurm: bool | None
    array_limit: int | None
    budget: float | None
    preflight: bool
    prune_oom: bool
    retry_failed: bool
    resume: str | None
    sweep_id: str | None
    dry_run: bool


_EPILOG = "Points are never requeued by Slurm: each takes its RUN_TIME at most, and `--resume` goes on with the rest."


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Run many points of a model: pruned, budgeted, resumable.",
    epilog=_EPILOG,
)
@click.option(
    "--vary",
    multiple=True,
    metavar="NAME=V,V",
    help="What varies; repeat it for a product. TP,EP=1:8,2:4 varies two together.",
)
@click.option(
    "--slurm/--local",
    "on_slurm",
    default=None,
    help="Job arrays, or one after another here. Default: Slurm when CLUSTER names a cluster.",
)
@click.option("--array-limit", type=click.IntRange(min=1), help="Most points of an array at once.")
@click.option(
    "--budget-node-hours",
    "budget",
    type=click.FloatRange(min=0, min_open=True),
    help="Start no point that might exceed it.",
)
@click.option("--preflight", is_flag=True, help="Ask Megatron itself about each point, too.")
@click.option(
    "--prune-oom", is_flag=True, help="Skip a larger MBS where a smaller ran out of memory."
)
@click.option("--retry-failed", is_flag=True, help="Start again what failed or ran out of time.")
@click.option("--resume", metavar="SWEEP", help="Go on; the command that began it does so, too.")
@click.option("--id", "sweep_id", metavar="NAME", help="Default: made from the command.")
@click.option("--dry-run", is_flag=True, help="Print plan and scripts, start nothing (DRY_RUN=1).")
@click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [--MEGATRON-FLAG VALUE]..."
)
def command(words: tuple[str, ...], **given: object) -> None:
    """Run every combination of what --vary lists, without those that a launch would refuse.

    Knobs of the environment and trailing Megatron flags are shared by all points. The sweep has its own directory,
    runs/sweeps/NAME; `summarize NAME` and `report NAME` read it.
    """
    options = Options(**given)  # type: ignore[arg-type]
    sys.exit(_go_on(options, words) if options.resume else _begin(options, words))


def _begin(options: Options, words: tuple[str, ...]) -> int:
    from moe_bench.config.machine import probe
    from moe_bench.sweep import cost, directory
    from moe_bench.sweep.plan import plan, refuse_none_legal
    from moe_bench.sweep.text import plan_lines

    asked = _asked(options, words)
    machine = probe(asked.request.environment)
    launcher = _launcher(asked, machine.device)
    found = plan(asked, machine, launcher, _megatron(asked) if options.preflight else None)
    refuse_none_legal(found)
    sweep = directory.described(
        found, budget_node_hours=options.budget, prune_oom=options.prune_oom
    )
    cost.refuse_too_small(sweep.points, options.budget)
    folder = directory.folder_of(found)
    is_dry = options.dry_run or request_of((), local=True).environment.get("DRY_RUN") == "1"
    _announce(found)
    for line in plan_lines(sweep, options.array_limit if asked.where == "slurm" else None):
        print(line, file=sys.stderr if is_dry else sys.stdout)
    if is_dry:
        return _dry_run(found, folder, options)
    if directory.is_there(folder):
        sweep = directory.again(folder, sweep)
    else:
        directory.make(folder, found, sweep)
    print(f"sweep directory {folder}", flush=True)
    if asked.where == "local":
        from moe_bench.cli._watching import prepare_demo_corpus

        prepare_demo_corpus(found.candidates[0].run, project=asked.request.base)
    return _work(folder, sweep, options)


def _go_on(options: Options, words: tuple[str, ...]) -> int:
    from moe_bench.results.sweep_record import find_sweep, read_sweep
    from moe_bench.sweep.directory import required

    if words or options.vary or options.sweep_id:
        raise ConfigError(
            f"--resume {options.resume} goes on with that sweep as it is, so MODEL, --vary, --id and flags have no place "
            "beside it; leave them out, or leave --resume out"
        )
    name = options.resume or ""
    base = _base()
    folder = required(find_sweep(name, base=base, beside_runs=False), name, base)
    sweep = read_sweep(folder)
    if options.budget is not None:
        sweep = replace(sweep, budget_node_hours=options.budget)
    return _work(folder, replace(sweep, prune_oom=sweep.prune_oom or options.prune_oom), options)


def _asked(options: Options, words: tuple[str, ...]) -> Asked:
    from moe_bench.config import command_line
    from moe_bench.sweep import axes
    from moe_bench.sweep.plan import Asked, known_names

    model, flags = _split(words)
    where = _where(options, request_of((), local=True).environment)
    request = request_of(flags, local=where == "local", must_name=where == "slurm")
    environment = {name: value for name, value in request.environment.items() if name not in _OURS}
    if model:
        environment["MODEL"] = model
    if where == "slurm":
        environment.setdefault("MAX_REQUEUES", "0")
    request = replace(request, environment=environment)
    varied = axes.parse(options.vary, lambda: known_names(request), command_line.parse(flags))
    _refuse_what_does_not_fit(options, where, environment)
    return Asked(request=request, axes=varied, where=where, sweep_id=_checked_id(options.sweep_id))


_OURS = frozenset({"RUN_ID", "DRY_RUN"})
"""Of the whole sweep, not of its points."""


def _split(words: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return None, words


def _where(options: Options, environment: Mapping[str, str]) -> str:
    from moe_bench.config.gather import DEFAULT_CLUSTER

    launcher = environment.get("LAUNCHER", "")
    if options.on_slurm is None and launcher:
        if launcher not in ("local", "slurm"):
            raise ConfigError(
                f"LAUNCHER={launcher} (environment): a sweep runs on this machine or as Slurm job arrays; "
                "unset LAUNCHER, or say --local or --slurm"
            )
        return launcher
    named = (environment.get("CLUSTER") or DEFAULT_CLUSTER) != DEFAULT_CLUSTER
    on_slurm = named if options.on_slurm is None else options.on_slurm
    return "slurm" if on_slurm else "local"


def _refuse_what_does_not_fit(options: Options, where: str, environment: Mapping[str, str]) -> None:
    if where == "slurm" and options.prune_oom:
        raise ConfigError(
            "--prune-oom needs one point to end before the next begins, and the elements of a job array do not wait; "
            "leave it out, or use --local"
        )
    if where == "local" and options.array_limit is not None:
        raise ConfigError(
            f"--array-limit {options.array_limit} is for job arrays, and this sweep runs on this machine one point at a time; "
            "leave it out, or use --slurm"
        )
    requeues = environment.get("MAX_REQUEUES", "0")
    if where == "slurm" and options.budget is not None and requeues != "0":
        raise ConfigError(
            f"MAX_REQUEUES={requeues} (environment) lets a point take its RUN_TIME more than once, so no budget would hold; "
            "unset it, or leave --budget-node-hours out"
        )


def _checked_id(given: str | None) -> str | None:
    if given is None:
        return None
    plain = given.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isalnum() and plain.isascii()) or given.startswith(".") or given == "latest":
        raise ConfigError(f"--id {given!r} names a directory; use letters, digits and . _ - only")
    return given


def _launcher(asked: Asked, device: str) -> SlurmLauncher | LocalLauncher:
    from moe_bench.launch.local import LocalLauncher
    from moe_bench.launch.slurm import SlurmLauncher

    project = asked.request.base
    if asked.where == "slurm":
        return SlurmLauncher(workspace=project, python=sys.executable)
    return LocalLauncher(project=project, python=sys.executable, device=device)


def _announce(found: SweepPlan) -> None:
    """What the runs replace or note, each thing once, however many points share it."""
    said: dict[str, None] = {}
    for one in found.candidates:
        said |= {
            f"substituted: {s.asked} -> {s.used} ({s.reason})": None for s in one.run.substitutions
        }
        said |= {f"note: {note}": None for note in one.run.notes}
    for line in list(said)[:_MOST_NOTES]:
        print(f"moe_bench: {line}", file=sys.stderr)
    if len(said) > _MOST_NOTES:
        print(
            f"moe_bench: {len(said) - _MOST_NOTES} more notes, in the points' run.json",
            file=sys.stderr,
        )


_MOST_NOTES = 20


def _dry_run(found: SweepPlan, folder: Path, options: Options) -> int:
    """Every script's bytes on standard output: of each point, and of the arrays that would be submitted."""
    from moe_bench.launch.slurm import SlurmLauncher
    from moe_bench.sweep import arrays, cost

    scripts = [(one.run.run_dir / one.plan.filename, one.plan.script) for one in found.candidates]
    launcher = _launcher(found.asked, "cpu")
    if isinstance(launcher, SlurmLauncher):
        runs = {one.point.number: one.run for one in found.candidates}
        fit, _ = cost.within([one.point for one in found.candidates], options.budget)
        members = [(point, runs[point.number]) for point in fit]
        made = arrays.render(launcher, members, folder, limit=options.array_limit)
        scripts = [*((folder / one.name, one.script) for one in made), *scripts]
    for path, script in scripts:
        digest = hashlib.sha256(script.encode()).hexdigest()
        sys.stdout.write(f"# ==== {path}  sha256 {digest}\n{script}")
    sys.stdout.flush()
    print("moe_bench: dry run: nothing was started or written", file=sys.stderr)
    return 0


def _megatron(asked: Asked) -> Check:
    """Ask Megatron's own parser and validation about each point."""
    from moe_bench.cli._preflighting import asker

    return asker(asked.request)


def _work(folder: Path, sweep: Sweep, options: Options) -> int:
    from moe_bench.cli._triage import rules_in_force
    from moe_bench.sweep.directory import locked

    rules = rules_in_force()
    with locked(folder):
        if sweep.where == "slurm":
            return _submit(folder, sweep, options, rules)
        from rich.console import Console

        from moe_bench.sweep.local_queue import LocalQueue

        queue = LocalQueue(
            folder,
            sweep,
            retry_failed=options.retry_failed,
            rules=rules,
            console=Console(highlight=False),
            called=_called(folder),
        )
        status = queue.run()
    if status != 130:
        _show(folder)
    return status


def _base() -> Path:
    """Where sweeps are looked for by their names."""
    return runs_folder(request_of((), local=True).environment)


def _called(folder: Path) -> str:
    """The sweep's name where that is enough to find it, else its path: a .conf may have set OUTPUT_PATH."""
    return folder.name if (_base() / "sweeps").resolve() == folder.parent.resolve() else str(folder)


def _submit(folder: Path, sweep: Sweep, options: Options, rules: Sequence[Rule]) -> int:
    from moe_bench.cli._launching import PROJECT
    from moe_bench.launch.slurm import SlurmLauncher
    from moe_bench.results.sweep_record import write_sweep
    from moe_bench.sweep import arrays

    sweep = arrays.refreshed(folder, sweep, rules)
    write_sweep(folder, sweep)
    launcher = SlurmLauncher(workspace=PROJECT, python=sys.executable)
    sweep, submitted, over = arrays.submit(
        launcher, folder, sweep, retry_failed=options.retry_failed, limit=options.array_limit
    )
    for array, job in submitted:
        first, last = array.points[0].number, array.points[-1].number
        print(
            f"submitted job {job}: {len(array.points)} points ({first} to {last}), {folder / array.name}"
        )
    if over:
        print(f"{len(over)} points do not fit the budget and were not submitted")
    flying = sum(arrays.in_flight(point) for point in sweep.points)
    print(
        f"{flying} of {len(sweep.points)} points wait or run; cancel all: scancel {' '.join(job for _, job in submitted)}"
        if submitted
        else f"nothing to submit; {flying} points wait or run"
    )
    print(f"watch: python -m moe_bench status {_called(folder)}")
    print(f"results: python -m moe_bench summarize {_called(folder)}")
    return 0


def _show(folder: Path) -> None:
    from rich.console import Console

    from moe_bench.results.sweep_summary import summarize_sweep
    from moe_bench.results.sweep_text import print_sweep

    print_sweep(summarize_sweep(folder), Console(highlight=False))
