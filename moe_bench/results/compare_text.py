"""A comparison as text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_bench.results.columns import columns
from moe_bench.results.compare import RATIO_RULE, Comparison, Ratio
from moe_bench.results.distribution import Distribution
from moe_bench.results.records import LM_LOSS
from moe_bench.results.summary import Summary
from moe_bench.results.summary_text import format_number, qualifications, rehearsal_banner
from moe_bench.units import format_loss


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Figures side by side, then what differs, then the verdict for each run."""
    for index, summary in enumerate(comparison.summaries):
        console.print(f"{letter(index)}  {summary.run_id}", markup=False, soft_wrap=True)
    console.print()
    for line in _figures(comparison):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    if comparison.differences:
        console.print(_differences(comparison))
    else:
        console.print("no knob, flag, environment variable or version differs")
    console.print()
    for line in verdicts(comparison):
        console.print(line, markup=False, soft_wrap=True)
    for index, summary in enumerate(comparison.summaries):
        if summary.rehearsal:
            console.print(f"{letter(index)}: {rehearsal_banner(summary)}", style="bold yellow")
        for warning in qualifications(summary):
            console.print(Text(f"{letter(index)}: warning: {warning}", style="yellow"))


def letter(index: int) -> str:
    """A, B, ..., Z, 27, 28, ...: what a run is called within a comparison."""
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def verdicts(comparison: Comparison) -> Iterator[str]:
    """One sentence for each run after the first, and the reasons where it is not ranked."""
    for index in range(1, len(comparison.summaries)):
        yield f"{letter(index)} against A: {_verdict(comparison, index)}"
    yield f"Bounds: {RATIO_RULE}."


def _verdict(comparison: Comparison, index: int) -> str:
    reasons = comparison.not_ranked_because[index]
    found = comparison.tokens_per_s[index]
    if found is None:
        return "nothing to compare, a run made no step"
    figure = f"{_ratio(found)} tokens/s"
    if reasons:
        return f"NOT RANKED: {'; '.join(reasons)} ({figure})"
    if found.bounds is None:
        return f"too few steps to tell, one of the two has fewer than 6 measured: {figure}"
    if found.conclusive:
        return f"{'faster' if found.ratio > 1 else 'slower'}, {figure}"
    return f"no difference beyond the noise, {figure}"


def _ratio(found: Ratio) -> str:
    if found.bounds is None:
        return f"{found.ratio:.3f}x (no bounds)"
    return f"{found.ratio:.3f}x ({found.bounds[0]:.3f} to {found.bounds[1]:.3f})"


def figure_rows(comparison: Comparison) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was measured: a name, and each run's value."""
    rows: tuple[tuple[str, Callable[[Summary], str]], ...] = (
        ("model", lambda one: one.model),
        ("routing", lambda one: one.routing_mode),
        ("ranks", lambda one: "-" if one.world_size is None else str(one.world_size)),
        ("steps measured", lambda one: str(one.step_time_s.count if one.step_time_s else 0)),
        ("step time, s", lambda one: _median(one.step_time_s)),
        ("tokens/s", lambda one: _median(one.tokens_per_s)),
        ("tokens/s/rank", lambda one: _median(one.tokens_per_s_per_rank)),
        ("TFLOP/s/GPU", lambda one: _median(one.tflops_per_gpu)),
        ("last loss", _last_loss),
        ("memory, GiB", lambda one: _number(max(one.memory_gib, default=None))),
        ("busiest expert / mean", lambda one: _number(one.balance.worst_max_over_mean if one.balance else None)),
    )  # fmt: skip
    for name, value in rows:
        yield name, tuple(value(summary) for summary in comparison.summaries)


def _figures(comparison: Comparison) -> list[str]:
    letters = (letter(index) for index in range(len(comparison.summaries)))
    rows = ([name, *values] for name, values in figure_rows(comparison))
    return columns([["median of the steady state", *letters], *rows])


def _differences(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what differs", overflow="fold")
    for index in range(len(comparison.summaries)):
        table.add_column(letter(index), overflow="fold")
    for difference in comparison.differences:
        cells = [
            Text("-" if value is None else value).append(f"\n{place}" if place else "", style="dim")
            for value, place in zip(difference.values, difference.places, strict=True)
        ]
        table.add_row(Text(f"{difference.kind} {difference.name}"), *cells)
    return table


def _median(figure: Distribution | None) -> str:
    return _number(figure.median if figure else None)


def _number(value: float | None) -> str:
    return "-" if value is None else format_number(value)


def _last_loss(summary: Summary) -> str:
    course = summary.losses.get(LM_LOSS)
    if course is None:
        return "-"
    return "not finite" if course.last is None else format_loss(course.last)
