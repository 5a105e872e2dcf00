"""A sweep in figures: its points ranked by tokens/s/GPU, and whether the first is first beyond the uncertainty."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import RecordError
from moe_bench.results.compare import RATIO_RULE, Ratio, other_work, ratio, stand_in
from moe_bench.results.distribution import Distribution
from moe_bench.results.manifest import Manifest, read_manifest
from moe_bench.results.state import standing
from moe_bench.results.summary import Summary, summarize
from moe_bench.results.summary_text import format_number
from moe_bench.results.sweep_record import COMPLETED, TIMED_OUT, Point, Pruned, Sweep, read_sweep

METHOD = (
    "the median tokens/s/GPU of each point's steady state, with its 95 % interval; "
    f"a lead is the {RATIO_RULE}, and counts when the bounds leave out 1. "
    "The intervals hold what varies from step to step, not what differs between two runs of the same point"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One point that made steps."""

    point: Point
    summary: Summary
    tokens_per_s_per_gpu: Distribution
    to_winner: Ratio | None
    """Its speed over the winner's; None where the two must not be compared."""
    not_ranked_because: tuple[str, ...]
    """Why it must not be ranked against the winner; empty when it may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmeasured:
    """One point without a figure, and why."""

    point: Point
    state: str
    why: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSummary:
    """All that `summarize` shows of a sweep."""

    sweep_id: str
    model: str
    folder: str
    varied: tuple[str, ...]
    ranked: tuple[Measured, ...]
    """The fastest first; those that must not be ranked against it last."""
    unmeasured: tuple[Unmeasured, ...]
    pruned: tuple[Pruned, ...]
    node_hours: float
    budget_node_hours: float | None
    verdict: tuple[str, ...]
    """The winner, and how sure that is."""
    method: str = METHOD


def summarize_sweep(folder: Path) -> SweepSummary:
    """Read a sweep and its points' records. Raises RecordError."""
    sweep = read_sweep(folder)
    measured: list[tuple[Point, Summary, Manifest]] = []
    unmeasured: list[Unmeasured] = []
    for point in sweep.points:
        found = _read(folder / point.name, point)
        if isinstance(found, Unmeasured):
            unmeasured.append(found)
        else:
            measured.append((point, *found))
    ranked = _ranked(measured)
    return SweepSummary(
        sweep_id=sweep.sweep_id,
        model=sweep.model,
        folder=str(folder),
        varied=sweep.varied,
        ranked=ranked,
        unmeasured=tuple(unmeasured),
        pruned=sweep.pruned,
        node_hours=sweep.node_hours,
        budget_node_hours=sweep.budget_node_hours,
        verdict=tuple(_verdict(ranked, sweep)),
    )


def _read(run_dir: Path, point: Point) -> Unmeasured | tuple[Summary, Manifest]:
    if point.skipped:
        return Unmeasured(point=point, state="not started", why=point.skipped)
    if not point.attempts:
        return Unmeasured(point=point, state="not started", why=None)
    last = point.attempts[-1]
    try:
        state = last.outcome or str(standing(run_dir).state)
        if state not in (COMPLETED, TIMED_OUT):
            return Unmeasured(point=point, state=state, why=last.why)
        summary = summarize(run_dir)
        if summary.tokens_per_s_per_rank is None:
            return Unmeasured(point=point, state=state, why=last.why or "it recorded no step")
        return summary, read_manifest(run_dir)
    except RecordError as error:
        return Unmeasured(point=point, state="unreadable", why=str(error))


def _ranked(measured: Sequence[tuple[Point, Summary, Manifest]]) -> tuple[Measured, ...]:
    by_speed = sorted(measured, key=lambda one: -_speed(one[1]).median)
    if not by_speed:
        return ()
    _, best, best_manifest = by_speed[0]
    found = [
        Measured(
            point=point,
            summary=summary,
            tokens_per_s_per_gpu=_speed(summary),
            to_winner=ratio(_speed(best), _speed(summary)) if not why else None,
            not_ranked_because=why,
        )
        for point, summary, manifest in by_speed
        for why in [_why_not(best, summary, best_manifest, manifest)]
    ]
    return tuple(sorted(found, key=lambda one: bool(one.not_ranked_because)))


def _why_not(
    best: Summary, other: Summary, best_manifest: Manifest, manifest: Manifest
) -> tuple[str, ...]:
    """Points that are a stand-in alike, or that all fell into the warm-up, are compared and said to be so."""
    unlike = tuple(other_work(best, other, best_manifest, manifest))
    return unlike if best.rehearsal == other.rehearsal else (*unlike, stand_in(other))


def _speed(summary: Summary) -> Distribution:
    speed = summary.tokens_per_s_per_rank
    if speed is None:
        raise RecordError(f"{summary.run_dir}: no step was recorded")
    return speed


def _verdict(ranked: Sequence[Measured], sweep: Sweep) -> list[str]:
    if not ranked:
        return ["no winner: no point has been measured yet"]
    best = ranked[0]
    lines = [f"winner: point {best.point.number} ({best.point.label}), {interval(best)}"]
    others = [one for one in ranked[1:] if not one.not_ranked_because]
    if others:
        lines.append(_lead(best, others[0]))
        close = list(itertools.takewhile(lambda one: not _behind(one), others))
        if len(close) > 1:
            numbers = ", ".join(str(one.point.number) for one in close)
            lines.append(f"points {numbers} cannot be told apart from the winner")
    elif len(ranked) == 1:
        lines.append("nothing to compare it with: no other point was measured")
    if unlike := [one for one in ranked if one.not_ranked_because]:
        lines.append(
            f"{len(unlike)} points are another workload and not ranked: {'; '.join(unlike[0].not_ranked_because)}"
        )
    if not best.summary.steady:
        lines.append("all its steps are warm-up: no steady state, so the order means little")
    waiting = len(sweep.points) - len(ranked)
    if waiting:
        lines.append(f"{waiting} of {len(sweep.points)} legal points have no figure")
    return lines


def _lead(best: Measured, second: Measured) -> str:
    found = ratio(second.tokens_per_s_per_gpu, best.tokens_per_s_per_gpu)
    who = f"point {second.point.number} ({second.point.label})"
    if found is None:
        return f"its lead over the second, {who}, cannot be given: that one's speed is 0"
    if found.bounds is None:
        return (
            f"its lead over the second, {who}: {found.ratio:.3f}x, of unknown certainty: "
            "one of the two has fewer than 6 measured steps; raise --train-iters"
        )
    bounds = f"{found.ratio:.3f}x ({found.bounds[0]:.3f} to {found.bounds[1]:.3f})"
    if found.conclusive:
        return f"its lead over the second, {who}: {bounds}, larger than the uncertainty"
    return f"its lead over the second, {who}: {bounds}, NOT larger than the uncertainty: the two cannot be told apart"


def _behind(one: Measured) -> bool:
    return one.to_winner is not None and one.to_winner.conclusive


def interval(one: Measured) -> str:
    """'2,450 tokens/s/GPU (95 % interval 2,430 to 2,470)'."""
    figure = one.tokens_per_s_per_gpu
    low, high = figure.interval or (figure.smallest, figure.largest)
    kind = "95 % interval" if figure.interval else f"range of {figure.count} steps"
    return f"{format_number(figure.median)} tokens/s/GPU ({kind} {format_number(low)} to {format_number(high)})"
