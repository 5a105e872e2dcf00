"""A sweep's plan as plain text: quick to print for a thousand points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bench.results.columns import columns
from moe_bench.results.sweep_record import Point, Pruned, Sweep
from moe_bench.sweep import cost
from moe_bench.sweep.plan import reasons
from moe_bench.units import format_duration

WHERE = {"local": "on this machine, one after another", "slurm": "as Slurm job arrays"}


def plan_lines(sweep: Sweep, limit: int | None = None) -> Iterator[str]:
    """What would run, what cannot and why, and what it may cost. `limit`: elements of an array at once."""
    total = len(sweep.points) + len(sweep.pruned)
    axes = " x ".join(
        f"{','.join(axis.names)} {' '.join(':'.join(one) for one in axis.values)}"
        for axis in sweep.axes
    )
    yield f"sweep {sweep.sweep_id}: {sweep.model}, {total} points ({axes})"
    yield f"{len(sweep.points)} can run, {WHERE[sweep.where]}{f', {limit} at once' if limit else ''}:"
    yield ""
    yield from table(sweep)
    if sweep.pruned:
        yield ""
        yield from pruned_lines(sweep.pruned)
    yield ""
    yield from cost_lines(sweep)


def table(sweep: Sweep) -> list[str]:
    """One line a point."""
    header = ["point", *sweep.varied, "nodes", "ranks", "GiB/rank*", "at most"]
    rows = [
        [
            str(point.number),
            *(point.values[name] for name in sweep.varied),
            str(point.nodes),
            str(point.ranks),
            "-" if point.states_gib is None else f"{point.states_gib:.3g}",
            format_duration(point.run_time_s),
        ]
        for point in sweep.points
    ]
    return [*columns([header, *rows]), "* estimated: weights, gradients and optimizer states only"]


def pruned_lines(pruned: Sequence[Pruned]) -> Iterator[str]:
    """Grouped by reason."""
    yield f"{len(pruned)} cannot run:"
    for line in reasons(pruned):
        yield f"  {line}"


def cost_lines(sweep: Sweep) -> Iterator[str]:
    """The worst case, and what of it the budget allows."""
    worst = cost.shown(cost.node_hours(sweep.points))
    if sweep.budget_node_hours is None:
        yield f"worst case {worst}: each point may take its whole RUN_TIME; --budget-node-hours X sets a limit"
        return
    fit, over = cost.within(sweep.points, sweep.budget_node_hours)
    yield f"budget {cost.shown(sweep.budget_node_hours)}, worst case {worst}"
    if over:
        yield (
            f"{len(fit)} points fit if each takes its whole RUN_TIME; not started until others turn out shorter: "
            f"{_numbers(over)}"
        )


def _numbers(points: Sequence[Point], most: int = 12) -> str:
    shown = ", ".join(str(point.number) for point in points[:most])
    return f"{shown} and {len(points) - most} more" if len(points) > most else shown
