"""A sweep's plots as plotly figures: plain data, no plotly import."""

from __future__ import annotations

import html
from collections.abc import Sequence

from moe_bench.results.figures import Figure, Trace
from moe_bench.results.sweep_record import Axis, label
from moe_bench.results.sweep_summary import Measured

MOST_BARS = 40
MOST_LINES = 8
"""Of one plot; with more combinations of the other axes only each value's points and their best are shown."""


def sweep_figures(ranked: Sequence[Measured], axes: Sequence[Axis]) -> list[Figure]:
    """The ranking, speed over each axis, and speed over memory; none without a measured point."""
    shown = [one for one in ranked if not one.not_ranked_because]
    if not shown:
        return []
    found = [_ranking(shown)]
    found += [_by_axis(shown, axis) for axis in axes if len(axis.values) > 1]
    return [*found, *_by_memory(shown)]


def _ranking(shown: Sequence[Measured]) -> Figure:
    bars = list(reversed(shown[:MOST_BARS]))
    trace: Trace = {
        "type": "bar",
        "orientation": "h",
        "colorIndex": 0,
        "x": [_rounded(one.tokens_per_s_per_gpu.median) for one in bars],
        "y": [_name(one) for one in bars],
        "error_x": _errors(bars),
        "hovertemplate": "%{y}: %{x:,.5g} tokens/s/GPU<extra></extra>",
    }
    left_out = len(shown) - len(bars)
    return Figure(
        title="Points by speed",
        caption="Median tokens/s/GPU of the steady state, with its 95 % interval."
        + (f" The fastest {len(bars)}; {left_out} more are in the table." if left_out else ""),
        traces=(trace,),
        x_title="tokens/s/GPU",
        y_title="",
        wide=True,
        height_px=max(200, 90 + 26 * len(bars)),
    )


def _by_axis(shown: Sequence[Measured], axis: Axis) -> Figure:
    name = ",".join(axis.names)
    ticks = [html.escape(":".join(values)) for values in axis.values]
    groups: dict[str, list[Measured]] = {}
    for one in shown:
        rest = {key: value for key, value in one.point.values.items() if key not in axis.names}
        groups.setdefault(label(rest), []).append(one)
    lines = len(groups) <= MOST_LINES
    traces = (
        [
            _line(axis, members, title, index)
            for index, (title, members) in enumerate(groups.items())
        ]
        if lines
        else [_points(axis, shown), _best(axis, shown)]
    )
    order = (
        "each line is one combination of the rest"
        if lines
        else "dots are points, the line joins the best"
    )
    return Figure(
        title=f"Speed over {name}",
        caption=f"Median tokens/s/GPU with its 95 % interval; {order}. A gap is a point without a figure.",
        traces=tuple(traces),
        x_title=name,
        y_title="tokens/s/GPU",
        x_category=bool(ticks),
    )


def _line(axis: Axis, members: Sequence[Measured], title: str, color: int) -> Trace:
    by_value = {_at(axis, one): one for one in members}
    found = [by_value.get(":".join(values)) for values in axis.values]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(title or "all"),
        "colorIndex": color,
        "line": {"width": 2},
        "x": [html.escape(":".join(values)) for values in axis.values],
        "y": [_rounded(one.tokens_per_s_per_gpu.median) if one else None for one in found],
        "error_y": _errors(found),
    }


def _points(axis: Axis, shown: Sequence[Measured]) -> Trace:
    order = {":".join(values): index for index, values in enumerate(axis.values)}
    ordered = sorted(shown, key=lambda one: order[_at(axis, one)])
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "points",
        "colorIndex": 0,
        "line": {"width": 0},
        "opacity": 0.5,
        "x": [html.escape(_at(axis, one)) for one in ordered],
        "y": [_rounded(one.tokens_per_s_per_gpu.median) for one in ordered],
        "text": [_name(one) for one in ordered],
    }


def _best(axis: Axis, shown: Sequence[Measured]) -> Trace:
    best: dict[str, Measured] = {}
    for one in shown:  # the fastest come first
        best.setdefault(_at(axis, one), one)
    return _line(axis, list(best.values()), "best", 1)


def _by_memory(shown: Sequence[Measured]) -> list[Figure]:
    measured = [one for one in shown if one.summary.memory_gib]
    if len(measured) < 2:
        return []
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "points",
        "colorIndex": 2,
        "line": {"width": 0},
        "x": [_rounded(max(one.summary.memory_gib)) for one in measured],
        "y": [_rounded(one.tokens_per_s_per_gpu.median) for one in measured],
        "text": [_name(one) for one in measured],
    }
    return [
        Figure(
            title="Speed over memory",
            caption="Each dot is a point: up is faster, left takes less memory on its fullest rank.",
            traces=(trace,),
            x_title="GiB",
            y_title="tokens/s/GPU",
        )
    ]


def _at(axis: Axis, one: Measured) -> str:
    return ":".join(one.point.values[name] for name in axis.names)


def _name(one: Measured) -> str:
    return html.escape(f"{one.point.number}: {one.point.label}")


def _errors(found: Sequence[Measured | None]) -> dict[str, object]:
    """From the median to the interval's ends; 0 where there is no interval."""
    ends = [_ends(one) for one in found]
    return {
        "type": "data",
        "symmetric": False,
        "array": [above for _, above in ends],
        "arrayminus": [below for below, _ in ends],
        "thickness": 1.5,
    }


def _ends(one: Measured | None) -> tuple[float, float]:
    if one is None or one.tokens_per_s_per_gpu.interval is None:
        return 0.0, 0.0
    median, (low, high) = one.tokens_per_s_per_gpu.median, one.tokens_per_s_per_gpu.interval
    return _rounded(median - low), _rounded(high - median)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
