"""Many runs at a glance, from the ends of their files."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import RecordError
from moe_bench.results.columns import columns
from moe_bench.results.manifest import RUN_FILE, read_manifest, run_dirs
from moe_bench.results.state import standing
from moe_bench.units import format_loss, format_rate


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


def listing_lines(runs: Sequence[ListedRun]) -> Iterator[str]:
    """For a terminal or a file: a line a run, never folded; what is wrong with one stands below it."""
    rows = [
        [
            run.run_id,
            f"{run.model} (rehearsal)" if run.rehearsal else run.model,
            run.state,
            *_figures(run),
        ]
        for run in runs
    ]
    header, *lines = columns([["run", "model", "state", "steps", "speed", "loss"], *rows])
    yield header
    for run, line in zip(runs, lines, strict=True):
        yield line
        if run.trouble:
            yield f"  {run.trouble}"


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
        "-" if run.loss is None else format_loss(run.loss),
    )
