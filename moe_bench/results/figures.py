"""A run's plots as plotly figures: plain data, no plotly import. Colours and fonts are the page's own."""

from __future__ import annotations

import html
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.reader import read_expert_loads
from moe_bench.results.records import LM_LOSS, StepBalance, StepRecord, told
from moe_bench.results.summary import Summary

MOST_POINTS = 1500
"""Of one line; of a longer run the steps that stand out are kept."""
MOST_SAMPLES = 100
"""Steps whose expert counts are averaged for the heat map."""

type Trace = dict[str, object]
"""In plotly's words. A line over the steps has no x but `axis`: which of the page's `StepAxis` it runs along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepAxis:
    """Where the points of a line stand, by each of the measures that the page's reader may choose."""

    step: list[int]
    tokens: list[int]
    """Consumed since the run's first step ever."""
    hours: list[float]
    """Since the first step recorded began, pauses of restarts and evaluations included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One loss of one evaluation."""

    split: str
    step: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One plot and the words beside it."""

    title: str
    caption: str
    """What is seen and how to read it; also read aloud by screen readers."""
    traces: tuple[Trace, ...]
    x_title: str
    y_title: str
    wide: bool = False
    """Takes the page's whole width."""
    log_y: bool = False
    height_px: int = 320
    categories: bool = False
    """Both axes count whole things (layers, experts), so ticks are whole numbers."""
    x_category: bool = False
    """The x axis holds names in the order given, though some may look like numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSeries:
    """A run's steps with the name and colour it has throughout the page."""

    name: str
    letter: str | None
    """What plots of several runs call it, where names would leave no room; None for a run alone."""
    color: int
    """Index into the page's palette."""
    run_dir: Path
    steps: tuple[StepBalance, ...]
    measured: tuple[StepBalance, ...]
    """The steady state; all steps when there is none."""
    shown: tuple[StepBalance, ...]
    """Those that lines are drawn of: `standing_out`."""
    summary: Summary
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def short(self) -> str:
        """Of a line in a legend."""
        return self.letter or self.name

    @property
    def evaluation_axis(self) -> int:
        """Of the page's axes; the lines' own is `color`."""
        return -1 - self.color


def step_axes(runs: Sequence[RunSeries]) -> list[StepAxis]:
    """One for each run's lines in order, then one for each run's evaluations, the last run's first."""
    axes = [_axis(run.steps, run.shown) for run in runs]
    for run in reversed(runs):
        by_step = {step.step: step for step in run.steps}
        evaluated = [by_step[one.step] for one in run.evaluations if one.step in by_step]
        axes.append(_axis(run.steps, evaluated))
    return axes


def _axis(steps: Sequence[StepBalance], shown: Sequence[StepBalance]) -> StepAxis:
    began_s = steps[0].time_unix_s - steps[0].step_time_s if steps else 0.0
    return StepAxis(
        step=[step.step for step in shown],
        tokens=[step.consumed_tokens for step in shown],
        hours=[round((step.time_unix_s - began_s) / 3600, 6) for step in shown],
    )


def standing_out(steps: tuple[StepBalance, ...]) -> tuple[StepBalance, ...]:
    """All, or of a long run those in which loss, gradient norm, time or balance are the least or most of their stretch.

    So a single spike among thousands of steps is still seen. The first and the last are there; at most MOST_POINTS.
    """
    if len(steps) <= MOST_POINTS:
        return steps
    per_stretch = 2 * len(_TELLING)
    stretches = MOST_POINTS // per_stretch
    bounds = [len(steps) * index // stretches for index in range(stretches + 1)]
    kept = {0, len(steps) - 1}
    for begin, end in itertools.pairwise(bounds):
        for telling in _TELLING:
            values = [
                (value, at) for at in range(begin, end) if (value := telling(steps[at])) is not None
            ]
            if values:
                kept |= {min(values)[1], max(values)[1]}
    return tuple(steps[at] for at in sorted(kept))


def _worst_load(step: StepBalance) -> float | None:
    return max((load.max_over_mean for load in step.expert_load), default=None)


_TELLING: tuple[Callable[[StepBalance], float | None], ...] = (
    lambda step: step.loss,
    lambda step: step.grad_norm,
    lambda step: step.step_time_s,
    _worst_load,
)


def figures(runs: Sequence[RunSeries]) -> list[Figure]:
    """Those for which the runs recorded something."""
    found = [_loss(runs), _tokens_per_s(runs), _step_time(runs), _grad_norm(runs)]
    found += [figure for run in runs for figure in _expert_figures(run, several=len(runs) > 1)]
    found += [_imbalance(runs), _entropy(runs), _other_losses(runs)]
    found += [_learning_rate(runs), _timers(runs), _memory(runs)]
    found += [_power(runs), _utilization(runs)]
    return [figure for figure in found if figure.traces]


def _loss(runs: Sequence[RunSeries]) -> Figure:
    evaluated = tuple(line for run in runs for line in _evaluation_lines(run, len(runs) > 1))
    dots = " Dots: evaluations." if evaluated else ""
    return Figure(
        title="Loss",
        caption=f"Language-model loss of each step. Lower is better.{dots}",
        traces=(*_lines(runs, lambda step: step.loss), *evaluated),
        x_title="step",
        y_title="loss",
    )


def _evaluation_lines(run: RunSeries, several: bool) -> Iterator[Trace]:
    known = {step.step for step in run.steps}
    shown = [one for one in run.evaluations if one.step in known]
    for index, split in enumerate(dict.fromkeys(one.split for one in shown)):
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": html.escape(f"{run.short}: {split}" if several else split),
            "colorIndex": run.color if several else index + 1,
            "line": {"width": 1},
            "marker": {"symbol": _SYMBOLS[index % len(_SYMBOLS)]},
            "axis": run.evaluation_axis,
            "y": [_rounded(one.loss) if one.split == split else None for one in shown],
        }


_SYMBOLS = ("circle", "diamond", "square", "cross")


def _learning_rate(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Learning rate",
        caption="Of each step, as the schedule sets it.",
        traces=_lines(runs, lambda step: step.learning_rate),
        x_title="step",
        y_title="learning rate",
    )


def _other_losses(runs: Sequence[RunSeries]) -> Figure:
    traces: list[Trace] = []
    for run in runs:
        names = dict.fromkeys(n for step in run.steps for n in step.losses if n != LM_LOSS)
        for index, name in enumerate(names):
            shown = name if len(runs) == 1 else f"{run.short}: {name}"
            line = _line(run, _loss_named(name), name=shown)
            color = index + 1 if len(runs) == 1 else run.color
            traces.append(
                line | {"colorIndex": color, "line": {"dash": _DASHES[index % 4], "width": 2}}
            )
    return Figure(
        title="Auxiliary losses",
        caption="Load-balancing, z and multi-token-prediction losses as Megatron reports them.",
        traces=tuple(traces),
        x_title="step",
        y_title="loss",
    )


_DASHES = ("solid", "dash", "dot", "dashdot")
_NUM_COLORS = 8
"""Of the page's palette; runs beyond them are dashed."""


def _loss_named(name: str) -> Callable[[StepBalance], float | None]:
    return lambda step: step.losses.get(name)


def _tokens_per_s(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Speed",
        caption="Tokens per second of the whole job. Faded: warm-up, left out of every median.",
        traces=_speed_lines(runs, lambda step: step.tokens_per_s),
        x_title="step",
        y_title="tokens/s",
    )


def _step_time(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Step time",
        caption="Seconds a step took. Faded: warm-up. The scale is logarithmic.",
        traces=_speed_lines(runs, lambda step: step.step_time_s),
        x_title="step",
        y_title="seconds",
        log_y=True,
    )


def _grad_norm(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Gradient norm",
        caption="Before clipping, by step. A gap is a skipped step or a norm that was not finite.",
        traces=_lines(runs, lambda step: step.grad_norm),
        x_title="step",
        y_title="norm",
    )


def _imbalance(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Busiest expert",
        caption="Tokens of the busiest expert over the mean, in the layer where it is worst. 1 is perfect balance.",
        traces=_lines(runs, _worst_load),
        x_title="step",
        y_title="max / mean",
    )


def _entropy(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="Routing entropy",
        caption="Entropy of the expert load, mean over layers: 1 is uniform, 0 is a single expert.",
        traces=_lines(runs, _mean_entropy),
        x_title="step",
        y_title="entropy",
    )


def _mean_entropy(step: StepBalance) -> float | None:
    if not step.expert_load:
        return None
    return statistics.fmean(load.entropy for load in step.expert_load)


def _expert_figures(run: RunSeries, *, several: bool) -> list[Figure]:
    suffix = f": {run.name}" if several else ""
    sampled = frozenset(step.step for step in _thinned(run.measured, MOST_SAMPLES))
    return [
        _load_heat_map(read_expert_loads(run.run_dir, sampled), suffix=suffix),
        _layer_heat_map(run.steps, suffix=suffix),
    ]


def _load_heat_map(records: Sequence[StepRecord], *, suffix: str) -> Figure:
    by_layer: dict[int, list[tuple[int, ...]]] = {}
    for record in records:
        for load in record.expert_load:
            by_layer.setdefault(load.layer, []).append(load.tokens_per_expert)
    layers = sorted(by_layer)
    rows = [_load_over_mean(by_layer[layer]) for layer in layers]
    trace: Trace = {
        "type": "heatmap",
        "z": rows,
        "x": list(range(max((len(row) for row in rows), default=0))),
        "y": layers,
        "zmin": 0,
        "zmax": 2,
        "colorscaleName": "diverging",
        "colorbar": _color_bar("load / mean"),
        "hovertemplate": "layer %{y}, expert %{x}<br>%{z:.2f} times the mean<extra></extra>",
    }
    return Figure(
        title=f"Expert load{suffix}",
        caption=f"Tokens each expert received over its layer's mean, averaged over {len(records)} steps of the "
        "steady state. Blue experts are starved, orange ones crowded; 2 and more look alike.",
        traces=(trace,) if rows else (),
        x_title="expert",
        y_title="layer",
        wide=True,
        height_px=_heat_map_height(len(rows)),
        categories=True,
    )


def _load_over_mean(counts: Sequence[tuple[int, ...]]) -> list[float | None]:
    totals = [sum(column) for column in zip(*counts, strict=True)]
    mean = sum(totals) / len(totals)
    return [_rounded(total / mean) if mean else None for total in totals]


def _layer_heat_map(steps: Sequence[StepBalance], *, suffix: str) -> Figure:
    shown = [step for step in _thinned(steps, 200) if step.expert_load]
    layers = sorted({load.layer for step in shown for load in step.expert_load})
    by_step = [{load.layer: load.max_over_mean for load in step.expert_load} for step in shown]
    trace: Trace = {
        "type": "heatmap",
        "z": [[_rounded(values.get(layer)) for values in by_step] for layer in layers],
        "x": [step.step for step in shown],
        "y": layers,
        "zmin": 1,
        "colorscaleName": "sequential",
        "colorbar": _color_bar("max / mean"),
        "hovertemplate": "layer %{y}, step %{x}<br>busiest expert %{z:.2f} times the mean<extra></extra>",
    }
    return Figure(
        title=f"Imbalance by layer over time{suffix}",
        caption="Busiest expert over the mean in each layer, step by step. Light in the light theme, "
        "dark in the dark theme: balanced.",
        traces=(trace,) if layers else (),
        x_title="step",
        y_title="layer",
        wide=True,
        height_px=_heat_map_height(len(layers)),
        categories=True,
    )


def _heat_map_height(rows: int) -> int:
    return min(max(200, 110 + 22 * rows), 640)


def _color_bar(title: str) -> dict[str, object]:
    return {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0}


def _timers(runs: Sequence[RunSeries]) -> Figure:
    medians = [run.summary.timers_s for run in runs]
    names = sorted(
        dict.fromkeys(name for timers in medians for name in timers),
        key=lambda name: max(timers.get(name, 0.0) for timers in medians),
    )[-16:]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(run.short),
            "colorIndex": run.color,
            "x": [_rounded(timers.get(name)) for name in names],
            "y": [html.escape(name) for name in names],
            "hovertemplate": "%{y}: %{x:.4g} s<extra></extra>",
        }
        for run, timers in zip(runs, medians, strict=True)
        if timers
    ]
    return Figure(
        title="Where a step's time goes",
        caption="Megatron's timers, median of the steady state, slowest rank. They overlap and nest, "
        "so they do not add up to the step.",
        traces=tuple(traces),
        x_title="seconds",
        y_title="",
        height_px=max(320, 90 + 26 * len(names)),
    )


def _memory(runs: Sequence[RunSeries]) -> Figure:
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": html.escape(run.short),
            "colorIndex": run.color,
            "x": list(range(len(run.summary.memory_gib))),
            "y": [_rounded(value) for value in run.summary.memory_gib],
            "hovertemplate": "rank %{x}: %{y:.3g} GiB<extra></extra>",
        }
        for run in runs
        if run.summary.memory_gib
    ]
    return Figure(
        title="Memory by rank",
        caption="Largest of all steps: allocated on the GPU, or the process's resident set on a CPU.",
        traces=tuple(traces),
        x_title="rank",
        y_title="GiB",
        categories=True,
    )


def _power(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="GPU power",
        caption="Sum over all GPUs, as NVML reports it.",
        traces=_lines(runs, lambda step: sum(told(step.gpus, "power_w")) or None),
        x_title="step",
        y_title="W",
    )


def _utilization(runs: Sequence[RunSeries]) -> Figure:
    return Figure(
        title="GPU utilisation",
        caption="Mean over all GPUs of the share of time in which a kernel ran.",
        traces=_lines(
            runs,
            lambda step: _mean(told(step.gpus, "utilization")),
        ),
        x_title="step",
        y_title="share",
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _lines(
    runs: Sequence[RunSeries], value: Callable[[StepBalance], float | None]
) -> tuple[Trace, ...]:
    """One line a run, left out where the run recorded nothing of it."""
    lines = (_line(run, value) for run in runs)
    return tuple(line for line in lines if any(y is not None for y in _values(line)))


def _values(line: Trace) -> list[object]:
    values = line["y"]
    return values if isinstance(values, list) else []


def _line(
    run: RunSeries, value: Callable[[StepBalance], float | None], *, name: str | None = None
) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines" if len(run.shown) > 1 else "markers",
        "name": html.escape(name or run.short),
        "colorIndex": run.color,
        "line": {"width": 2, "dash": _DASHES[run.color // _NUM_COLORS % 4]},
        "axis": run.color,
        "y": [_rounded(value(step)) for step in run.shown],
    }


def _speed_lines(
    runs: Sequence[RunSeries], value: Callable[[StepBalance], float | None]
) -> tuple[Trace, ...]:
    """Every step faded, the measured ones in full on top."""
    traces: list[Trace] = []
    for run in runs:
        if not run.steps:
            continue
        measured = {step.step for step in run.measured} if run.summary.steady else set()
        faded = _line(run, value)
        full = faded | {"y": _only(measured, run, value)}
        traces += [faded | {"opacity": 0.35, "showlegend": False, "hoverinfo": "skip"}, full]
    return tuple(traces)


def _only(
    steps: set[int], run: RunSeries, value: Callable[[StepBalance], float | None]
) -> list[float | None]:
    return [_rounded(value(step)) if step.step in steps else None for step in run.shown]


def _thinned[T](items: Sequence[T], most: int) -> Sequence[T]:
    """Evenly, the last one kept."""
    stride = math.ceil(len(items) / most) if items else 1
    return items[(len(items) - 1) % stride :: stride] if items else items


def _rounded(value: float | None) -> float | None:
    """Six significant digits keep the page small; None where there is nothing to plot."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
