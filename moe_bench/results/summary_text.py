"""A summary as text for a terminal or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_bench.results.distribution import Distribution
from moe_bench.results.records import LM_LOSS, STEPS_FILE
from moe_bench.results.summary import NOT_THE_REAL_MODEL, Balance, LossCourse, Summary
from moe_bench.units import format_duration, format_loss

Row = tuple[str, str]


def print_summary(summary: Summary, console: Console) -> None:
    """What `summarize` and the end of a launch show: a panel, and below it the paths, unbroken."""
    console.print(_panel(summary))
    for name, path in summary_paths(summary):
        console.print(f"{name}: {path}", markup=False, soft_wrap=True)


def summary_paths(summary: Summary) -> Iterator[Row]:
    """What the run wrote that exists now."""
    root = Path(summary.run_dir)
    names = {
        "record": STEPS_FILE,
        "logs": "logs",
        "tensorboard": "tensorboard",
        "profiles": "profiles",
    }
    for name, path in names.items():
        if (root / path).exists():
            yield name, str(root / path)
    if summary.checkpoints:
        yield f"checkpoints ({len(summary.checkpoints)}), the last", summary.checkpoints[-1]


def _panel(summary: Summary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(summary):
        table.add_row(name, Text(value))
    parts: list[RenderableType] = [table]
    if summary.rehearsal:
        parts.insert(0, Text(rehearsal_banner(summary), style="bold yellow"))
    parts += [Text(f"warning: {line}", style="yellow") for line in qualifications(summary)]
    parts += [Text(f"error: {error}", style="bold red") for error in summary.errors]
    title = Text(f"{summary.model}  {summary.run_id}")
    return Panel(Group(*parts), title=title, title_align="left", expand=False)


def rehearsal_banner(summary: Summary) -> str:
    """Said wherever the figures of a shrunken model are shown."""
    return f"{NOT_THE_REAL_MODEL}: a shrunken rehearsal of {summary.model}"


def summary_rows(summary: Summary) -> Iterator[Row]:
    """Name and value, in the order in which they are shown."""
    yield "state", _state(summary)
    if summary.num_steps:
        yield "measured", _window(summary)
    yield from _speed(summary)
    for name, course in summary.losses.items():
        yield ("loss" if name == LM_LOSS else name), _loss(course)
    if summary.grad_norm:
        yield "grad norm", f"{summary.grad_norm.median:.4g} median"
    if summary.memory_gib:
        rank = max(range(len(summary.memory_gib)), key=summary.memory_gib.__getitem__)
        yield "memory", f"{summary.memory_gib[rank]:.3g} GiB on rank {rank}, the largest"
    yield "routing", summary.routing_mode
    if summary.balance:
        yield "expert load", _balance(summary.balance)
    if summary.startup_s is not None:
        yield "start-up", f"{format_duration(summary.startup_s)} to the end of the first step"
    for substitution in summary.substitutions:
        yield "substituted", f"{substitution.asked} -> {substitution.used} ({substitution.reason})"


def qualifications(summary: Summary) -> tuple[str, ...]:
    """What a reader of the figures must know, and what the run itself warned of."""
    own: list[str] = []
    if summary.num_steps and not summary.steady:
        own.append(
            f"all {summary.num_steps} steps are warm-up: the figures cover them and are no steady state"
        )
    for name, course in summary.losses.items():
        if course.num_not_finite:
            own.append(f"{name} was not finite in {course.num_not_finite} steps")
    if summary.skipped_steps:
        own.append(f"{summary.skipped_steps} optimizer steps were skipped")
    if summary.balance and summary.balance.dropped_tokens:
        own.append(f"{summary.balance.dropped_tokens:,} token assignments were dropped")
    if summary.rolled_back_steps:
        own.append(f"{summary.rolled_back_steps} steps were lost to a restart and made again")
    own += [
        f"{place}: unfinished record of a killed process, left out"
        for place in summary.torn_records
    ]
    return (*own, *summary.warnings)


def format_distribution(figure: Distribution, *, unit: str, digits: int = 4) -> str:
    """'3,301 tokens/s (95 % interval 3,280 to 3,322, spread 2.1 %)'."""
    low, high = figure.interval or (figure.smallest, figure.largest)
    kind = "95 % interval" if figure.interval else "range"
    return (
        f"{format_number(figure.median, digits)} {unit} ({kind} {format_number(low, digits)} to "
        f"{format_number(high, digits)}, spread {format_share(figure.spread)})"
    )


def format_number(value: float, digits: int = 4) -> str:
    """Significant digits, with separators where the number is large: 12,345 and 0.01235."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def format_share(share: float) -> str:
    """0.021 -> '2.1 %'."""
    return f"{100 * share:.1f} %"


def _state(summary: Summary) -> str:
    planned = f" of {summary.train_steps}" if summary.train_steps else ""
    if (summary.first_step or 1) > 1:  # it went on from a checkpoint
        made = f"{summary.num_steps}{planned} steps, from step {summary.first_step} on"
    else:
        made = f"{summary.num_steps}{planned} steps"
    state = f"{summary.state}, {made}"
    if summary.attempts > 1:
        state += f", {summary.attempts} starts"
    return state


def _window(summary: Summary) -> str:
    measured = summary.num_steps - summary.warmup_steps
    if not summary.steady:
        return f"{measured} steps, all of them warm-up"
    return f"{measured} steps after {summary.warmup_steps} of warm-up"


def _speed(summary: Summary) -> Iterator[Row]:
    if summary.step_time_s:
        yield "step time", format_distribution(summary.step_time_s, unit="s")
    if summary.tokens_per_s:
        yield "speed", format_distribution(summary.tokens_per_s, unit="tokens/s")
    if summary.tokens_per_s_per_rank and summary.world_size and summary.world_size > 1:
        each = format_number(summary.tokens_per_s_per_rank.median)
        yield "", f"{each} tokens/s for each of {summary.world_size} ranks"
    if summary.tflops_per_gpu:
        formula = f" (formula {summary.flop_formula})" if summary.flop_formula else ""
        yield "compute", f"{format_number(summary.tflops_per_gpu.median)} TFLOP/s/GPU{formula}"
    if summary.device:
        yield "device", summary.device


def _loss(course: LossCourse) -> str:
    first, last = (_loss_value(value) for value in (course.first, course.last))
    if course.last_steps_mean is None:
        return f"{first} -> {last}"
    return f"{first} -> {last} (mean of the last steps {format_loss(course.last_steps_mean)})"


def _loss_value(value: float | None) -> str:
    return "not finite" if value is None else format_loss(value)


def _balance(balance: Balance) -> str:
    dead = (
        f"; up to {balance.dead_experts} dead experts (layer {balance.dead_layer})"
        if balance.dead_experts
        else "; no dead experts"
    )
    return (
        f"busiest expert {balance.worst_max_over_mean:.2f}x the mean in layer {balance.worst_layer}, "
        f"{balance.mean_max_over_mean:.2f}x over all layers{dead}"
    )
