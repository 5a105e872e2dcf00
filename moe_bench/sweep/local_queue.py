"""A sweep on this machine: one point after another, each watched, each bounded by its RUN_TIME, all bounded by the budget."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch import local
from moe_bench.launch.directory import RUN_FILE
from moe_bench.launch.launcher import LaunchPlan
from moe_bench.launch.status import find_failure
from moe_bench.results.live import follow
from moe_bench.results.reader import read_last_steps
from moe_bench.results.state import has_ended
from moe_bench.results.summary import summarize
from moe_bench.results.summary_text import format_number
from moe_bench.results.sweep_record import (
    COMPLETED,
    ENDED_BADLY,
    FAILED,
    INTERRUPTED,
    LOST,
    TIMED_OUT,
    Attempt,
    Point,
    Sweep,
    write_sweep,
)
from moe_bench.results.triage import Rule
from moe_bench.results.writer import close_record
from moe_bench.sweep import cost
from moe_bench.units import format_duration

OUT_OF_MEMORY = ("out of GPU memory", "out of host memory")
LARGEST_GRACE_S = 60.0
EXIT_PATIENCE_S = 5.0
"""How long the processes of a point whose time is over may take to go, each time that they are told."""
GRACE_SHARE = 0.1
"""Of its RUN_TIME a point has this share, a minute at most, to end once it was asked to: it is gone by its RUN_TIME."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or a closed terminal."""


class LocalQueue:
    """Runs what is left of a sweep; every change is in `sweep.json` before the next thing happens."""

    def __init__(
        self,
        folder: Path,
        sweep: Sweep,
        *,
        retry_failed: bool,
        rules: Sequence[Rule],
        console: Console,
        called: str | None = None,
    ) -> None:
        """`rules`: by which failures are named. `called`: what --resume finds the sweep by; None: its path."""
        self._folder = folder
        self._sweep = sweep
        self._retry_failed = retry_failed
        self._rules = rules
        self._console = console
        self._called = called or str(folder)
        self._holding = False
        self._held = False

    @property
    def sweep(self) -> Sweep:
        """As it stands now."""
        return self._sweep

    def run(self) -> int:
        """To the end. Returns 0 when every legal point that may start has completed, 1 when one failed, 130 interrupted."""
        self._take_stock()
        left = [point for point in self._sweep.points if is_left(point, self._retry_failed)]
        self._say_stock(len(left))
        before = {number: signal.signal(number, self._interrupt) for number in _STOPPING}
        try:
            for position, point in enumerate(left, start=1):
                self._start_or_skip(self._point(point.number), position, len(left))
        except KeyboardInterrupt:
            return self._interrupted()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._finished()

    def _take_stock(self) -> None:
        """Attempts without an end belong to a queue that died: their processes must be gone."""
        for point in self._sweep.points:
            last = point.attempts[-1] if point.attempts else None
            if last is None or last.ended_unix_s is not None:
                continue
            if last.process is not None and process_began(last.process) == last.process_began:
                raise LaunchError(
                    f"point {point.number} ({point.label}) still runs as process {last.process}, "
                    f"left behind by a sweep that was killed; wait for it, or stop it: kill {last.process}"
                )
            ended = max(_last_written_unix_s(self._folder / point.name), last.started_unix_s)
            why = "the sweep's process died while it ran"
            self._end(point, outcome=LOST, ended_unix_s=ended, why=why)

    def _say_stock(self, left: int) -> None:
        done = sum(point.outcome == COMPLETED for point in self._sweep.points)
        if any(point.attempts for point in self._sweep.points):
            self._say(f"going on: {done} of {len(self._sweep.points)} points are done, {left} left")
        bad = [p for p in self._sweep.points if p.outcome in ENDED_BADLY]
        if bad and not self._retry_failed:
            self._say(
                f"left alone, they {FAILED} or {TIMED_OUT}: {_numbers(bad)}; --retry-failed starts them again"
            )

    def _start_or_skip(self, point: Point, position: int, of: int) -> None:
        if self._sweep.prune_oom and (smaller := out_of_memory_before(point, self._sweep.points)):
            why = f"point {smaller.number} (MBS={smaller.values['MBS']}) was {smaller.attempts[-1].why}"
            self._change(replace(point, skipped=why))
            self._say(f"[{position}/{of}] point {point.number}  {point.label}: skipped, {why}")
            return
        budget = self._sweep.budget_node_hours
        if budget is not None and self._sweep.node_hours + point.most_node_hours > budget + 1e-9:
            why = (
                f"it may take {cost.shown(point.most_node_hours)}, and of the budget of {budget:g} "
                f"{cost.shown(budget - self._sweep.node_hours)} are left"
            )
            self._change(replace(point, skipped=why))
            self._say(f"[{position}/{of}] point {point.number}  {point.label}: not started, {why}")
            return
        self._say(
            f"[{position}/{of}] point {point.number}  {point.label}  "
            f"({self._folder / point.name}, at most {format_duration(point.run_time_s)})"
        )
        self._run(replace(point, skipped=None))

    def _run(self, point: Point) -> None:
        run_dir = self._folder / point.name
        run = ResolvedRun.from_json((run_dir / RUN_FILE).read_bytes())
        script = (run_dir / local.SCRIPT).read_text()
        plan = LaunchPlan(launcher="local", filename=local.SCRIPT, script=script)
        if plan.sha256 != point.script_sha256:
            raise LaunchError(
                f"{run_dir / local.SCRIPT} was changed since the sweep was made; put it back, or start a new sweep with --id NAME"
            )
        started = time.time()
        with self._signals_held():  # between the start and the record of it nothing may come
            process = local.start(plan, run)
            attempt = Attempt(
                started_unix_s=started,
                process=process.pid,
                process_began=process_began(process.pid),
                node_hours=point.most_node_hours,
            )
            self._change(replace(point, attempts=(*point.attempts, attempt)))
        bounded = Bounded(process, run_dir, point.run_time_s)
        try:
            self._raise_held()
            status = follow(run_dir, bounded, console=self._console)
        except KeyboardInterrupt:
            self._say("interrupted: stopping the ranks ...")
            local.stop(process, has_ended=lambda: has_ended(run_dir, started))
            if not has_ended(run_dir, started):
                close_record(run_dir, INTERRUPTED)
            self._end(self._point(point.number), outcome=INTERRUPTED)
            raise
        self._ended(self._point(point.number), status, timed_out=bounded.timed_out)

    def _ended(self, point: Point, status: int, *, timed_out: bool) -> None:
        run_dir = self._folder / point.name
        if timed_out:
            steps = read_last_steps(run_dir, 1)
            made = f"{steps[-1].step} of {steps[-1].train_steps} steps" if steps else "no step"
            why = f"its RUN_TIME of {format_duration(point.run_time_s)} was over after {made}"
            self._end(point, outcome=TIMED_OUT, why=why)
        elif status == 0:
            self._end(point, outcome=COMPLETED)
        else:
            self._end(point, outcome=FAILED, why=_cause(run_dir, self._rules, status))
        self._say_result(self._point(point.number))

    def _say_result(self, point: Point) -> None:
        last = point.attempts[-1]
        taken = format_duration((last.ended_unix_s or last.started_unix_s) - last.started_unix_s)
        figure = ""
        if last.outcome == COMPLETED:
            speed = summarize(self._folder / point.name).tokens_per_s_per_rank
            figure = f", {format_number(speed.median)} tokens/s/GPU" if speed else ""
        why = f": {last.why}" if last.why else ""
        self._say(
            f"point {point.number} {last.outcome} after {taken}{figure}{why}{self._remaining()}"
        )

    def _remaining(self) -> str:
        """What is left, and how long it may take by what was measured."""
        waiting = sum(
            is_left(point, retry=False) and not point.skipped for point in self._sweep.points
        )
        done = [p.attempts[-1] for p in self._sweep.points if p.outcome == COMPLETED]
        if not waiting or not done:
            return ""
        mean_s = sum((a.ended_unix_s or 0) - a.started_unix_s for a in done) / len(done)
        return f"; {waiting} left, about {format_duration(waiting * mean_s)}"

    def _end(
        self,
        point: Point,
        *,
        outcome: str,
        ended_unix_s: float | None = None,
        why: str | None = None,
    ) -> None:
        ended = time.time() if ended_unix_s is None else ended_unix_s
        *earlier, last = point.attempts
        hours = point.nodes * (ended - last.started_unix_s) / 3600
        closed = replace(last, ended_unix_s=ended, outcome=outcome, why=why, node_hours=hours)
        self._change(replace(point, attempts=(*earlier, closed)))

    @contextlib.contextmanager
    def _signals_held(self) -> Iterator[None]:
        """A signal within the block waits for `_raise_held`."""
        self._holding = True
        yield
        self._holding = False

    def _raise_held(self) -> None:
        if self._held:
            raise Interrupted

    def _interrupt(self, _number: int, _frame: object) -> None:
        if not self._holding:
            raise Interrupted
        self._held = True

    def _interrupted(self) -> int:
        done = sum(point.outcome == COMPLETED for point in self._sweep.points)
        self._say(f"{done} of {len(self._sweep.points)} points are done; go on with:")
        self._say(f"  python -m moe_bench sweep --resume {shlex.quote(self._called)}")
        return 130

    def _finished(self) -> int:
        outcomes = [point.outcome for point in self._sweep.points]
        counts = {one: outcomes.count(one) for one in (COMPLETED, FAILED, TIMED_OUT)}
        not_started = sum(bool(point.skipped) for point in self._sweep.points)
        said = [f"{count} {one}" for one, count in counts.items() if count]
        said += [f"{not_started} not started"] if not_started else []
        self._say(
            f"sweep {self._sweep.sweep_id}: {', '.join(said)}; {cost.shown(self._sweep.node_hours)} used"
        )
        return 1 if counts[FAILED] else 0

    def _point(self, number: int) -> Point:
        return self._sweep.points[number - 1]

    def _change(self, point: Point) -> None:
        points = list(self._sweep.points)
        points[point.number - 1] = point
        self._sweep = replace(self._sweep, points=tuple(points))
        write_sweep(self._folder, self._sweep)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class Bounded:
    """A local script that is asked to end shortly before its time is over, and made to by then."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, limit_s: float) -> None:
        grace_s = min(LARGEST_GRACE_S, GRACE_SHARE * limit_s)
        self._process = process
        self._run_dir = run_dir
        self._patience_s = grace_s
        self._started_unix_s = time.time()
        asked_after_s = limit_s - grace_s - 3 * EXIT_PATIENCE_S
        self._deadline_s = time.monotonic() + max(asked_after_s, limit_s / 2)
        self.timed_out = False
        """Whether it had to be asked."""

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        status = self._process.poll()
        if status is not None or time.monotonic() < self._deadline_s:
            return status
        self.timed_out = True
        return local.stop(
            self._process,
            has_ended=lambda: has_ended(self._run_dir, self._started_unix_s),
            patience_s=self._patience_s,
            exit_patience_s=EXIT_PATIENCE_S,
        )


def _cause(run_dir: Path, rules: Sequence[Rule], status: int) -> str:
    failure = find_failure(run_dir, rules)
    return failure.short if failure else f"status {status}"


def is_left(point: Point, retry: bool) -> bool:
    """Whether the point is to be started: never yet, interrupted, lost, or, with `retry`, ended badly."""
    if point.outcome == COMPLETED:
        return False
    return retry or point.outcome not in ENDED_BADLY


def out_of_memory_before(point: Point, points: Iterable[Point]) -> Point | None:
    """A point that ran out of memory with a smaller MBS and is otherwise the same."""
    if "MBS" not in point.values:
        return None
    for other in points:
        if (
            other.outcome == FAILED
            and other.attempts[-1].why in OUT_OF_MEMORY
            and _without_mbs(other.values) == _without_mbs(point.values)
            and int(other.values["MBS"]) < int(point.values["MBS"])
        ):
            return other
    return None


def _without_mbs(values: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if name != "MBS"}


def process_began(pid: int) -> str | None:
    """When the process of that number began, in the kernel's ticks; None when there is none. Field 22 of proc(5)'s stat."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state == "Z" else rest[18]


def _last_written_unix_s(run_dir: Path) -> float:
    files = (path for folder in ("results", "logs") for path in (run_dir / folder).glob("*"))
    return max((path.stat().st_mtime for path in files), default=0.0)


def _numbers(points: Iterable[Point]) -> str:
    return ", ".join(str(point.number) for point in points)


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
