"""Node-hours. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from moe_bench.errors import ConfigError
from moe_bench.results.sweep_record import Point
from moe_bench.units import format_duration


def node_hours(points: Iterable[Point]) -> float:
    """What one attempt of each may take."""
    return sum(point.most_node_hours for point in points)


def within(
    points: Iterable[Point], left_node_hours: float | None
) -> tuple[list[Point], list[Point]]:
    """Those that fit when each takes all it may, in order, and those that do not. None: no limit."""
    fit: list[Point] = []
    over: list[Point] = []
    for point in points:
        if left_node_hours is None:
            fit.append(point)
        elif point.most_node_hours <= left_node_hours + 1e-9:
            left_node_hours -= point.most_node_hours
            fit.append(point)
        else:
            over.append(point)
    return fit, over


def refuse_too_small(points: Iterable[Point], budget: float | None) -> None:
    """Raises ConfigError when not even the cheapest point may start."""
    cheapest = min(points, key=lambda point: point.most_node_hours)
    if budget is not None and cheapest.most_node_hours > budget + 1e-9:
        raise ConfigError(
            f"--budget-node-hours {budget:g} is less than the cheapest point may take: "
            f"{shown(cheapest.most_node_hours)} ({cheapest.nodes} nodes for RUN_TIME {format_duration(cheapest.run_time_s)}, "
            f"point {cheapest.number}); raise it, or lower RUN_TIME"
        )


def shown(hours: float) -> str:
    """'0.083 node-hours'."""
    return f"{hours:.3g} node-hours"
