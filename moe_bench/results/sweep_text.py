"""A sweep's summary as text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from moe_bench.results.columns import columns
from moe_bench.results.records import LM_LOSS
from moe_bench.results.summary import NOT_THE_REAL_MODEL
from moe_bench.results.summary_text import format_number
from moe_bench.results.sweep_record import grouped, label
from moe_bench.results.sweep_summary import Measured, SweepSummary
from moe_bench.units import format_loss

MOST_PRUNED = 20
FIGURES = ("tokens/s/GPU", "95 % interval", "of winner", "steps", "step s", "GiB", "loss")
"""What `figures` gives of a point."""


def print_sweep(summary: SweepSummary, console: Console) -> None:
    """The ranking, the winner with its uncertainty, what failed, what could not run."""
    console.print(f"sweep {summary.sweep_id}: {summary.model}", markup=False, soft_wrap=True)
    if any(one.summary.rehearsal for one in summary.ranked):
        console.print(f"{NOT_THE_REAL_MODEL}: shrunken rehearsals", style="bold yellow")
    if summary.ranked:
        console.print()
        for line in table(summary):
            console.print(line, markup=False, soft_wrap=True)
    console.print()
    for line in summary.verdict:
        console.print(line, markup=False, soft_wrap=True)
    for line in other_lines(summary):
        console.print(Text(line), soft_wrap=True)
    console.print(f"method: {summary.method}.", style="dim", markup=False, soft_wrap=True)


def other_lines(summary: SweepSummary) -> Iterator[str]:
    """Points without a figure, combinations that cannot run, and what it cost."""
    for one in summary.unmeasured:
        why = f": {one.why}" if one.why else ""
        yield f"point {one.point.number} ({one.point.label}) {one.state}{why}"
    for reason, members in grouped(summary.pruned)[:MOST_PRUNED]:
        shown = "; ".join(label(one.values) for one in members[:3])
        more = f" and {len(members) - 3} more" if len(members) > 3 else ""
        yield f"cannot run: {shown}{more}: {reason}".replace("\n", "\n  ")
    budget = "" if summary.budget_node_hours is None else f" of {summary.budget_node_hours:g}"
    yield f"used {summary.node_hours:.3g}{budget} node-hours"


def table(summary: SweepSummary) -> list[str]:
    """One line a measured point, the fastest first."""
    header = ["point", *summary.varied, *FIGURES]
    rows = [
        [
            str(one.point.number),
            *(one.point.values[name] for name in summary.varied),
            *figures(one),
        ]
        for one in summary.ranked
    ]
    return columns([header, *rows])


def figures(one: Measured) -> tuple[str, ...]:
    """Speed, interval, share of the winner's, steps measured, step time, memory, loss."""
    speed, step = one.tokens_per_s_per_gpu, one.summary.step_time_s
    course = one.summary.losses.get(LM_LOSS)
    bounds = speed.interval
    return (
        format_number(speed.median),
        f"{format_number(bounds[0])} to {format_number(bounds[1])}" if bounds else "too few steps",
        "not ranked" if one.to_winner is None else f"{one.to_winner.ratio:.3f}",
        f"{speed.count}{'' if one.summary.steady else ' (warm-up)'}",
        format_number(step.median, 3) if step else "-",
        format_number(max(one.summary.memory_gib), 3) if one.summary.memory_gib else "-",
        format_loss(course.last) if course and course.last is not None else "-",
    )
