"""Many runs at a glance, from the ends of their files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from moe_bench.errors import RecordError
from moe_bench.results.manifest import RUN_FILE, read_manifest, run_dirs
from moe_bench.results.state import standing
from moe_bench.units import format_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedRun:
    """One line of `runs`."""

    run_id: str
    """What it is found by: its directory's name."""
    model: str
    state: str
    """A `State`, or "unreadable" with the reason in `trouble`."""
    rehearsal: bool = False
    step: int | None = None
    """The last one made; None before the first."""
    train_steps: int | None = None
    tokens_per_s: float | None = None
    """Median of the last steps (20 at most), warm-up included: `summarize` measures."""
    loss: float | None = None
    """Of the last step."""
    trouble: str | None = None


def list_runs(base: Path) -> list[ListedRun]:
    """Newest first. A run whose record cannot be read is listed as such."""
    newest_first = sorted(
        run_dirs(base), key=lambda d: (d / RUN_FILE).stat().st_mtime_ns, reverse=True
    )
    return [_listed(run_dir) for run_dir in newest_first]


def listing_table(runs: Sequence[ListedRun]) -> Table:
    """For a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("state")
    for name in ("steps", "speed", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        model = f"{run.model} (rehearsal)" if run.rehearsal else run.model
        state = f"{run.state}: {run.trouble}" if run.trouble else run.state
        table.add_row(Text(run.run_id), Text(model), Text(state), *_figures(run))
    return table


def _listed(run_dir: Path) -> ListedRun:
    try:
        manifest = read_manifest(run_dir)
        now = standing(run_dir)
    except RecordError as error:
        return ListedRun(run_id=run_dir.name, model="?", state="unreadable", trouble=str(error))
    last = now.last_steps[-1] if now.last_steps else None
    return ListedRun(
        run_id=run_dir.name,
        model=manifest.model,
        state=now.state,
        rehearsal=manifest.rehearsal,
        step=last.step if last else None,
        train_steps=last.train_steps if last else None,
        tokens_per_s=statistics.median(s.tokens_per_s for s in now.last_steps) if last else None,
        loss=last.loss if last else None,
    )


def _figures(run: ListedRun) -> tuple[str, str, str]:
    return (
        "-" if run.step is None else f"{run.step}/{run.train_steps}",
        "-" if run.tokens_per_s is None else format_rate(run.tokens_per_s),
        "-" if run.loss is None else f"{run.loss:.4f}",
    )
