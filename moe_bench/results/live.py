"""Shows a run while it trains, from its record alone: on a terminal as a live display, elsewhere as plain lines."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from moe_bench.results.reader import Tail, event_files, tail_events, tail_steps
from moe_bench.results.records import LM_LOSS, Event, StepBalance
from moe_bench.units import format_duration, format_loss, format_rate

_POLL_S = 0.2
_RECENT_STEPS = 20
_PLAIN_INTERVAL_S = 5.0
_PLAIN_INTERVAL_AFTER_S = 30.0
"""Between plain step lines, in the first minute and after it."""
_SPARKS = "▁▂▃▄▅▆▇█"


class Process(Protocol):
    """What runs: a `subprocess.Popen`, or anything that can say whether it is over."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        ...


def follow(run_dir: Path, process: Process, *, console: Console | None = None) -> int:
    """Show the run's progress until `process` is over; returns its exit code.

    Reads `results/*.jsonl` only, so it neither needs the ranks' output nor minds how they end.
    """
    console = console or Console(stderr=False, highlight=False)
    watch = Watch(run_dir)
    display = _LiveDisplay(console) if console.is_terminal else _PlainDisplay(console)
    with display:
        while (exit_code := process.poll()) is None:
            display.update(watch, watch.poll())
            time.sleep(_POLL_S)
        display.update(watch, watch.poll())
        display.finish(watch)
    return exit_code


class Watch:
    """What is known of a run so far; `poll` reads what was written since."""

    def __init__(self, run_dir: Path) -> None:
        self.phase: str | None = None
        """What happens now, before the first step; None when nobody has said."""
        self.started_s = time.monotonic()
        self.last: StepBalance | None = None
        self.first_loss: float | None = None
        self.losses: deque[float] = deque(maxlen=200)
        self.ended: Event | None = None
        self._recent: deque[StepBalance] = deque(maxlen=_RECENT_STEPS)
        self._run_dir = run_dir
        self._steps = tail_steps(run_dir)
        self._events: dict[Path, Tail[Event]] = {}
        self._said: set[str] = set()

    def poll(self) -> list[Event]:
        """Take in new records; returns the events worth a line, a message of several ranks once."""
        news = [event for event in self._new_events() if self._take_event(event)]
        for step in self._steps.poll():
            self._take_step(step)
        return news

    @property
    def tokens_per_s(self) -> float:
        """Median of the last steps, of the whole job."""
        return statistics.median(step.tokens_per_s for step in self._recent)

    @property
    def step_time_s(self) -> float:
        """Median of the last steps."""
        return statistics.median(step.step_time_s for step in self._recent)

    @property
    def remaining_s(self) -> float | None:
        """Estimated from the last steps; None before the first."""
        if self.last is None:
            return None
        return max(self.last.train_steps - self.last.step, 0) * self.step_time_s

    @property
    def worst_balance(self) -> float | None:
        """Busiest expert over the mean, in the layer where it is worst; None without routers."""
        if self.last is None:
            return None
        return max((load.max_over_mean for load in self.last.expert_load), default=None)

    def _new_events(self) -> list[Event]:
        for path in event_files(self._run_dir):
            self._events.setdefault(path, tail_events(path))
        found = [event for tail in self._events.values() for event in tail.poll()]
        return sorted(found, key=lambda event: event.time_unix_s)

    def _take_event(self, event: Event) -> bool:
        if event.event == "end" and event.rank == 0:
            self.ended = event
        if event.event == "phase":
            phase = str(event.fields.get("phase", ""))
            if event.rank != 0 or not phase or phase == self.phase:
                return False
            self.phase = phase
            return True
        message = describe(event)
        if message is None or message in self._said:
            return False
        self._said.add(message)
        return True

    def _take_step(self, step: StepBalance) -> None:
        self.last = step
        self._recent.append(step)
        if step.loss is not None:
            self.losses.append(step.loss)
            if self.first_loss is None:
                self.first_loss = step.loss


_SENTENCES: Mapping[str, str] = {
    "phase": "{phase} ...",
    "warning": "warning: {message}",
    "error": "error on rank {rank}: {message}",
    "checkpoint_saved": "checkpoint saved: step {step}, {path}",
    "checkpoint_loaded": "checkpoint loaded: step {step}, {path}",
    "evaluation": "evaluation ({split}) at step {step}: {losses}",
    "profile": "profile written: {path}",
    "embedding": "CPU embedding: {replaced} parts of CUDA replaced",
    "wandb": "W&B {mode}: {where}",
}


def describe(event: Event) -> str | None:
    """One line for people; None for an event that says nothing to someone who watches."""
    sentence = _SENTENCES.get(event.event)
    if sentence is None:
        return None
    fields = event.fields
    words = {
        **dict.fromkeys(("phase", "message", "step", "path", "mode", "split"), "?"),
        **fields,
        "rank": event.rank,
        "losses": _losses(fields.get("losses")),
        "replaced": _count(fields.get("replaced")),
        "where": fields.get("url") or fields.get("path") or "",
    }
    return sentence.format_map(words)


def _losses(losses: object) -> str:
    if not isinstance(losses, Mapping):
        return "no losses"
    return ", ".join(
        f"{name} {format_loss(value)}" if isinstance(value, float) else f"{name} {value}"
        for name, value in losses.items()
    )


def _count(replaced: object) -> str:
    return str(len(replaced)) if isinstance(replaced, list | tuple) else "some"


def spark_line(values: list[float], *, width: int) -> str:
    """The course of finite `values` in `width` characters or fewer, each the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    cells = [
        statistics.fmean(values[i * len(values) // width : (i + 1) * len(values) // width])
        for i in range(width)
    ]
    low, high = min(cells), max(cells)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((cell - low) * scale)] for cell in cells)


class _PlainDisplay:
    """Lines for a log file or a pipe: each phase and warning, and now and then a step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_step = 0
        self._shown_s = 0.0

    def __enter__(self) -> _PlainDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, watch: Watch, news: list[Event]) -> None:
        for event in news:
            self._line(f"[{format_duration(time.monotonic() - watch.started_s)}] {describe(event)}")
        step = watch.last
        if step is None or step.step == self._shown_step:
            return
        now = time.monotonic()
        early = now - watch.started_s < 60
        interval = _PLAIN_INTERVAL_S if early else _PLAIN_INTERVAL_AFTER_S
        if self._shown_step == 0 or now - self._shown_s >= interval:
            self._show_step(watch, step)

    def finish(self, watch: Watch) -> None:
        if watch.last is not None and watch.last.step != self._shown_step:
            self._show_step(watch, watch.last)

    def _show_step(self, watch: Watch, step: StepBalance) -> None:
        self._shown_step, self._shown_s = step.step, time.monotonic()
        parts = [f"step {step.step}/{step.train_steps}"]
        parts += [f"{name} {value}" for name, value in _figures(watch, step)]
        self._line("  ".join(parts))

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class _LiveDisplay:
    """A block at the terminal's foot that is redrawn; events scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> _LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def update(self, watch: Watch, news: list[Event]) -> None:
        for event in news:
            if event.event != "phase":
                self._console.print(_styled(event))
        self._live.update(self._render(watch))

    def finish(self, watch: Watch) -> None:
        self._live.update(self._progress(watch, watch.last) if watch.last else Text(""))

    def _render(self, watch: Watch) -> Group | Spinner:
        if watch.last is None:
            waited = format_duration(time.monotonic() - watch.started_s)
            phase = escape(watch.phase or "starting the ranks")
            self._spinner.update(text=Text.from_markup(f"{phase} [dim]{waited}[/dim]"))
            return self._spinner
        return self._progress(watch, watch.last)

    def _progress(self, watch: Watch, step: StepBalance) -> Group:
        bar = Table.grid(padding=(0, 1), expand=False)
        bar.add_row(
            Text(f"step {step.step}/{step.train_steps}", style="bold"),
            ProgressBar(total=max(step.train_steps, 1), completed=step.step, width=40),
            Text(f"{100 * step.step / max(step.train_steps, 1):.0f} %"),
            Text(spark_line(list(watch.losses), width=24), style="cyan"),
        )
        figures = Table.grid(padding=(0, 3))
        shown = _figures(watch, step)
        figures.add_row(*(Text(name, style="dim") for name, _ in shown))
        figures.add_row(*(Text(value) for _, value in shown))
        return Group(bar, figures)


def _figures(watch: Watch, step: StepBalance) -> list[tuple[str, str]]:
    """Names and values in the order in which they are shown."""
    figures: list[tuple[str, str]] = []
    if step.loss is not None:
        figures.append(("loss", format_loss(step.loss)))
    elif LM_LOSS in step.losses:
        figures.append(("loss", f"NOT FINITE ({step.not_finite.get(LM_LOSS, 'null')})"))
    if step.skipped:
        figures.append(("optimizer", "skipped"))
    figures.append(("speed", format_rate(watch.tokens_per_s)))
    figures.append(("step time", _step_time(watch.step_time_s)))
    if step.peak_memory_gib is not None:
        figures.append(("memory/rank", f"{step.peak_memory_gib:.3g} GiB"))
    if watch.worst_balance is not None:
        figures.append(("busiest expert", f"{watch.worst_balance:.2f}x mean"))
    if watch.remaining_s:
        figures.append(("ETA", format_duration(watch.remaining_s)))
    return figures


def _step_time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _styled(event: Event) -> Text:
    style = {"warning": "yellow", "error": "bold red"}.get(event.event, "dim")
    return Text(describe(event) or "", style=style)
