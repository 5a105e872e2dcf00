"""Runs as one HTML page that needs nothing else: no network, no fonts, no files beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import msgspec

from moe_bench.errors import MissingExtraError
from moe_bench.results.compare import Comparison, compare
from moe_bench.results.compare_text import figure_rows, letter, verdicts
from moe_bench.results.figures import (
    Evaluation,
    Figure,
    RunSeries,
    StepAxis,
    figures,
    standing_out,
    step_axes,
)
from moe_bench.results.manifest import Manifest, Value, read_manifest
from moe_bench.results.reader import read_events, read_steps
from moe_bench.results.records import LM_LOSS, Event
from moe_bench.results.summary import NOT_THE_REAL_MODEL, Summary, steady_steps
from moe_bench.results.summary_text import format_number, format_share, qualifications, summary_rows
from moe_bench.units import format_loss

MOST_EVENTS = 500
"""The last ones are shown of each run; the JSONL has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One headline figure."""

    label: str
    value: str
    unit: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownEvent:
    """One line of the events table."""

    time: str
    rank: int
    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPage:
    """What the page shows of one run."""

    name: str
    letter: str | None
    """A, B, ...: what the comparison and the plots call it; None for a run alone."""
    color: int
    summary: Summary
    cards: tuple[Card, ...]
    rows: tuple[tuple[str, str], ...]
    qualifications: tuple[str, ...]
    settings: tuple[tuple[str, str, Value], ...]
    """Kind (knob, flag, env), name, value."""
    events: tuple[ShownEvent, ...]
    num_events: int


def render_report(run_dirs: Sequence[Path]) -> str:
    """The page's text. Raises RecordError, or MissingExtraError without plotly's JavaScript."""
    comparison = compare(run_dirs)
    manifests = [read_manifest(run_dir) for run_dir in run_dirs]
    pages = [
        _run_page(summary, manifest, run_dir, index, several=len(run_dirs) > 1)
        for index, (summary, manifest, run_dir) in enumerate(
            zip(comparison.summaries, manifests, run_dirs, strict=True)
        )
    ]
    series = [_series(page, run_dir) for page, run_dir in zip(pages, run_dirs, strict=True)]
    shown = figures(series)
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            title=_title(comparison),
            not_the_real_model=NOT_THE_REAL_MODEL,
            made=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
            runs=pages,
            differences=comparison.differences,
            verdicts=list(verdicts(comparison)) if len(pages) > 1 else [],
            measured=list(figure_rows(comparison)),
            figures=shown,
            page_json=page_json(shown, step_axes(series)),
            plotly_js=plotly_js(),
        )
    )


def page_environment() -> jinja2.Environment:
    """Where pages come from: every value is escaped, and one that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _title(comparison: Comparison) -> str:
    models = list(dict.fromkeys(summary.model for summary in comparison.summaries))
    return ", ".join(models)


def _run_page(
    summary: Summary, manifest: Manifest, run_dir: Path, index: int, *, several: bool
) -> RunPage:
    events = read_events(run_dir).records
    return RunPage(
        name=summary.run_id,
        letter=letter(index) if several else None,
        color=index,
        summary=summary,
        cards=tuple(_cards(summary)),
        rows=tuple(summary_rows(summary)),
        qualifications=qualifications(summary),
        settings=tuple(_settings(manifest)),
        events=tuple(
            _shown_event(event, since=events[0].time_unix_s) for event in events[-MOST_EVENTS:]
        ),
        num_events=len(events),
    )


def _series(page: RunPage, run_dir: Path) -> RunSeries:
    steps = read_steps(run_dir)
    measured = steady_steps(steps.records, attempt_starts=steps.attempt_starts)
    return RunSeries(
        name=page.name,
        letter=page.letter,
        color=page.color,
        run_dir=run_dir,
        steps=steps.records,
        measured=measured or steps.records,
        shown=standing_out(steps.records),
        summary=page.summary,
        evaluations=tuple(_evaluations(read_events(run_dir).records)),
    )


def _evaluations(events: Sequence[Event]) -> Iterator[Evaluation]:
    for event in events:
        losses, step = event.fields.get("losses"), event.fields.get("step")
        if (
            event.event != "evaluation"
            or not isinstance(losses, Mapping)
            or not isinstance(step, int)
        ):
            continue
        loss = losses.get(LM_LOSS)
        if isinstance(loss, int | float):
            yield Evaluation(
                split=str(event.fields.get("split", "validation")), step=step, loss=loss
            )


def _cards(summary: Summary) -> Iterator[Card]:
    if summary.tokens_per_s:
        low, high = summary.tokens_per_s.interval or (
            summary.tokens_per_s.smallest,
            summary.tokens_per_s.largest,
        )
        kind = "95 % interval" if summary.tokens_per_s.interval else "range"
        yield Card(
            label="Speed",
            value=format_number(summary.tokens_per_s.median),
            unit="tokens/s",
            detail=f"{kind} {format_number(low)} to {format_number(high)}",
        )
    if summary.step_time_s:
        yield Card(
            label="Step time",
            value=format_number(summary.step_time_s.median, 3),
            unit="s",
            detail=f"median of {summary.step_time_s.count} steps, spread {format_share(summary.step_time_s.spread)}",
        )
    if summary.tflops_per_gpu:
        yield Card(
            label="Compute",
            value=format_number(summary.tflops_per_gpu.median, 3),
            unit="TFLOP/s/GPU",
            detail="formula: see details" if summary.flop_formula else "formula not recorded",
        )
    course = summary.losses.get(LM_LOSS)
    if course:
        yield Card(
            label="Loss",
            value="not finite" if course.last is None else format_loss(course.last),
            unit="",
            detail="from " + ("not finite" if course.first is None else format_loss(course.first)),
        )
    if summary.memory_gib:
        yield Card(
            label="Memory",
            value=format_number(max(summary.memory_gib), 3),
            unit="GiB",
            detail=f"largest of {len(summary.memory_gib)} ranks",
        )
    if summary.balance:
        yield Card(
            label="Busiest expert",
            value=f"{summary.balance.worst_max_over_mean:.2f}",
            unit="x mean",
            detail=f"layer {summary.balance.worst_layer}, routing {summary.routing_mode}",
        )


def _settings(manifest: Manifest) -> Iterator[tuple[str, str, Value]]:
    layers: tuple[tuple[str, Mapping[str, Value]], ...] = (
        ("knob", manifest.knobs),
        ("flag", manifest.args),
        ("env", manifest.env),
    )
    for kind, layer in layers:
        for name, value in layer.items():
            yield kind, name, value


def _shown_event(event: Event, *, since: float) -> ShownEvent:
    return ShownEvent(
        time=f"+{event.time_unix_s - since:.1f} s",
        rank=event.rank,
        name=event.event,
        text=", ".join(f"{name}: {_plain(value)}" for name, value in event.fields.items()),
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def page_json(figures: Sequence[Figure], axes: Sequence[StepAxis] = ()) -> str:
    """JSON for the page's script that cannot end the element it stands in, whatever it holds."""
    text = msgspec.json.encode({"figures": figures, "axes": axes}).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def plotly_js() -> str:
    """The library's own JavaScript, as it lies in the installed package (MIT)."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise MissingExtraError("plotly", extra="train", needed_for="report")
    text = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text("utf-8")
    return text.replace("</script", "<\\/script")
