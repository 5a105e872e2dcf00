"""A local run from its start to its summary, as a user sees it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from moe_bench.arguments.corpus import reads_demo
from moe_bench.cli._launching import demo_request
from moe_bench.config.run import ResolvedRun
from moe_bench.config.sources import process_environment
from moe_bench.data.demo import find_demo
from moe_bench.errors import RecordError
from moe_bench.launch import local
from moe_bench.launch.launcher import LaunchPlan
from moe_bench.results.live import follow
from moe_bench.results.records import Event
from moe_bench.results.summary import summarize
from moe_bench.results.summary_text import print_summary
from moe_bench.results.triage import diagnose
from moe_bench.results.writer import RunWriter

_ERROR_LINES = 15
INTERRUPTED = 130


def prepare_demo_corpus(run: ResolvedRun, *, project: Path) -> None:
    """Make the demo corpus where the run reads it and it is not there yet. Raises DataError."""
    if not reads_demo(run):
        return
    request = demo_request(project, process_environment())
    if find_demo(request) is None:
        from moe_bench.data.corpus import build_demo

        print("preparing the demo corpus (once) ...", file=sys.stderr, flush=True)
        build_demo(request)


def watch(plan: LaunchPlan, run: ResolvedRun) -> int:
    """Start the plan and show it until its end. Returns the exit code: 0 done, 1 a rank failed, 130 interrupted."""
    print(f"run directory {run.run_dir}", flush=True)
    process = local.start(plan, run)
    try:
        status = follow(run.run_dir, process)
    except KeyboardInterrupt:
        print("\ninterrupted: stopping the ranks ...", file=sys.stderr, flush=True)
        local.stop(process)
        _close_record(run, "interrupted")
        _show_summary(run)
        return INTERRUPTED
    if status != 0:
        _show_failure(run, status)
        return status if status == 2 else 1
    _show_summary(run)
    return 0


def _close_record(run: ResolvedRun, outcome: str) -> None:
    writer = RunWriter(run.run_dir, source="launcher")
    writer.event(Event(event="end", time_unix_s=time.time(), fields={"outcome": outcome}))
    writer.close()


def _show_summary(run: ResolvedRun) -> None:
    try:
        print_summary(summarize(run.run_dir), Console(highlight=False))
    except RecordError as error:
        print(f"no summary: {error}", file=sys.stderr)
    _show_paths(run)


def _show_paths(run: ResolvedRun) -> None:
    for name, what in (
        ("run.json", "every value with its origin"),
        ("launch.sh", "the very script that ran"),
        ("results/steps.jsonl", "one line a step"),
        ("results/events.jsonl", "what happened"),
        ("logs", "what each rank said"),
        ("tensorboard", "tensorboard --logdir"),
        ("checkpoints", "checkpoints"),
        ("profiles", "profiles"),
    ):
        path = run.run_dir / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            print(f"  {path}  ({what})")


def _show_failure(run: ResolvedRun, status: int) -> None:
    log = first_failing_log(run.run_dir)
    lines = log.read_text(errors="replace").splitlines() if log else []
    print(f"error: the run failed with status {status}; {log} ends:", file=sys.stderr)
    for line in telling_lines(lines):
        print(f"  {line}", file=sys.stderr)
    diagnosis = diagnose(lines)
    if diagnosis:
        print(f"this looks like: {diagnosis.name}; {diagnosis.what_to_do}", file=sys.stderr)
    print(f"all logs: {run.run_dir / 'logs'}", file=sys.stderr)


def first_failing_log(run_dir: Path) -> Path | None:
    """The log of the rank whose traceback was written first; the launcher's own log when no rank left one."""
    logs = sorted(run_dir.glob("logs/**/*"), key=lambda path: path.stat().st_mtime)
    texts = [path for path in logs if path.is_file() and path.stat().st_size]
    failing = [
        path
        for path in texts
        if "rank" in path.name and "Traceback" in path.read_text(errors="replace")
    ]
    launcher = run_dir / local.LOG
    return next(iter(failing), launcher if launcher.exists() else None)


def telling_lines(lines: Iterable[str]) -> list[str]:
    """The end of the last traceback, or the last lines."""
    kept = [line for line in lines if line.strip()]
    starts = [
        index for index, line in enumerate(kept) if "Traceback (most recent call last)" in line
    ]
    tail = kept[starts[-1] :] if starts else kept
    return tail[-_ERROR_LINES:]
