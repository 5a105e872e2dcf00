"""A local run from its start to its summary, as a user sees it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console

from moe_bench.arguments.corpus import reads_demo
from moe_bench.cli._launching import demo_request
from moe_bench.cli._triage import rules_in_force
from moe_bench.config.run import ResolvedRun
from moe_bench.config.sources import process_environment
from moe_bench.data.demo import find_demo
from moe_bench.errors import RecordError
from moe_bench.launch import local
from moe_bench.launch.directory import RUN_FILE
from moe_bench.launch.launcher import LaunchPlan
from moe_bench.launch.status import find_failure, first_failing_log
from moe_bench.results.live import follow
from moe_bench.results.reader import read_events
from moe_bench.results.state import has_ended
from moe_bench.results.summary import summarize
from moe_bench.results.summary_text import print_summary
from moe_bench.results.triage import Diagnosis, diagnose, without_ignored
from moe_bench.results.writer import close_record

_ERROR_LINES = 15


class Told(KeyboardInterrupt):
    """A signal to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


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
    """Start the plan and show it until its end. Returns the exit code: 0 done, 1 a rank failed, 128+N on signal N."""
    print(f"run directory {run.run_dir}", flush=True)
    with _told() as listen:
        process = local.start(plan, run)
        try:
            listen()
            status = follow(run.run_dir, process)
        except Told as told:
            _stop(process, run)
            return 128 + told.number
    if status != 0:
        _show_failure(run, status)
        return status if status == 2 else 1
    _show_summary(run)
    return 0


@contextlib.contextmanager
def _told() -> Iterator[Callable[[], None]]:
    """Within the block a signal to stop is kept until what this yields is called, and raises Told from then on.

    One that was ignored before (nohup) still is.
    """
    kept: list[int] = []
    listening = False

    def tell(number: int, _frame: object) -> None:
        if listening:
            raise Told(number)
        kept.append(number)

    def listen() -> None:
        nonlocal listening
        listening = True
        if kept:
            raise Told(kept[0])

    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in stopping if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, tell) for number in heard}
    try:
        yield listen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(process: subprocess.Popen[bytes], run: ResolvedRun) -> None:
    saves = "--save" in run.args
    then = "save and end (Ctrl-C again: end at once)" if saves else "end"
    print(f"\ninterrupted: after this step the ranks {then} ...", file=sys.stderr, flush=True)
    patience_s = local.SAVE_PATIENCE_S if saves else local.STEP_PATIENCE_S
    local.stop(process, has_ended=lambda: has_ended(run.run_dir), patience_s=patience_s)
    if not has_ended(run.run_dir):
        close_record(run.run_dir, "interrupted")
    _show_summary(run)


def _show_summary(run: ResolvedRun) -> None:
    try:
        print_summary(summarize(run.run_dir), Console(highlight=False))
    except RecordError as error:
        print(f"no summary: {error}", file=sys.stderr)
    _show_paths(run)


def _show_paths(run: ResolvedRun) -> None:
    print(f"every value with its origin: {run.run_dir / RUN_FILE}")
    print(f"the very script that ran: {run.run_dir / local.SCRIPT}")
    for line in _wandb_lines(run.run_dir):
        print(line)


def _wandb_lines(run_dir: Path) -> list[str]:
    """Where the W&B mirror is, or how to send what it kept."""
    lines = []
    for event in read_events(run_dir).records:
        if event.event == "wandb" and "url" in event.fields:
            lines.append(f"on W&B: {event.fields['url']}")
        elif event.event == "wandb" and "sync" in event.fields:
            lines.append(f"send it to W&B with: {event.fields['sync']}")
    return lines


def _show_failure(run: ResolvedRun, status: int) -> None:
    log = failing_log(run.run_dir)
    lines = log.read_text(errors="replace").splitlines()
    print(f"error: the run failed with status {status}; {log} ends:", file=sys.stderr)
    for line in telling_lines(lines):
        print(f"  {line}", file=sys.stderr)
    if diagnosis := _diagnosis(run.run_dir, lines):
        print(f"this looks like: {diagnosis.name}; {diagnosis.what_to_do}", file=sys.stderr)
    print(f"all logs: {run.run_dir / 'logs'}", file=sys.stderr)


def failing_log(run_dir: Path) -> Path:
    """The first failing rank's, else the launcher's own."""
    return first_failing_log(run_dir) or run_dir / local.LOG


def _diagnosis(run_dir: Path, lines: Iterable[str]) -> Diagnosis | None:
    """By the failing rank's own words, else by the other ranks'."""
    rules = rules_in_force()
    if found := diagnose(lines, rules):
        return found
    failure = find_failure(run_dir, rules)
    return failure.diagnosis if failure else None


def telling_lines(lines: Iterable[str]) -> list[str]:
    """The end of the last traceback, after what was said before it and the ones that led to it; or the last lines."""
    kept = [line for line in without_ignored(lines) if line.strip()]
    starts = [index for index, line in enumerate(kept) if _TRACEBACK in line]
    if not starts:
        return kept[-_ERROR_LINES:]
    first = last = starts.pop()
    while starts and any(kept[first - 1].startswith(link) for link in _LINKS):
        first = starts.pop()
    return [*kept[max(0, first - _LINES_BEFORE) : first], *kept[last:][-_ERROR_LINES:]]


_LINES_BEFORE = 3
_TRACEBACK = "Traceback (most recent call last)"
_LINKS = ("The above exception was the direct cause", "During handling of the above exception")
"""What Python writes between two tracebacks of one failure."""
