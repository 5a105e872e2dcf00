"""Sweeps as one HTML page that needs nothing else: no network, no fonts, no files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe_bench.results.figures import Figure
from moe_bench.results.report import page_environment, page_json, plotly_js
from moe_bench.results.summary import NOT_THE_REAL_MODEL
from moe_bench.results.sweep_figures import sweep_figures
from moe_bench.results.sweep_record import Sweep, grouped, label, read_sweep
from moe_bench.results.sweep_summary import Measured, SweepSummary, summarize_sweep
from moe_bench.results.sweep_text import FIGURES, figures

MOST_NAMED = 12
"""Combinations of one reason that are named; sweep.json has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPage:
    """What the page shows of one sweep."""

    summary: SweepSummary
    rehearsal: bool
    used: str
    figures: tuple[tuple[int, Figure], ...]
    """With their place among the whole page's."""
    rows: tuple[tuple[Measured, tuple[str, ...]], ...]
    pruned: tuple[tuple[int, str, str], ...]
    """How many, which, why."""
    shared: tuple[tuple[str, str], ...]


def render_sweeps(folders: Sequence[Path]) -> str:
    """The page's text. Raises RecordError, or MissingExtraError without plotly's JavaScript."""
    pages: list[SweepPage] = []
    shown: list[Figure] = []
    for folder in folders:
        page = _page(folder, first_figure=len(shown))
        shown += [figure for _, figure in page.figures]
        pages.append(page)
    return (
        page_environment()
        .get_template("sweep.html.jinja")
        .render(
            title=", ".join(dict.fromkeys(f"Sweep of {page.summary.model}" for page in pages)),
            not_the_real_model=NOT_THE_REAL_MODEL,
            made=datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC"),
            pages=pages,
            figure_names=FIGURES,
            page_json=page_json(shown),
            plotly_js=plotly_js(),
        )
    )


def _page(folder: Path, *, first_figure: int) -> SweepPage:
    sweep, summary = read_sweep(folder), summarize_sweep(folder)
    found = sweep_figures(summary.ranked, sweep.axes)
    budget = "" if summary.budget_node_hours is None else f" of {summary.budget_node_hours:g}"
    return SweepPage(
        summary=summary,
        rehearsal=any(one.summary.rehearsal for one in summary.ranked),
        used=f"{summary.node_hours:.3g}{budget} node-hours",
        figures=tuple(enumerate(found, start=first_figure)),
        rows=tuple((one, figures(one)) for one in summary.ranked),
        pruned=tuple(_pruned(summary)),
        shared=tuple(_shared(sweep, folder)),
    )


def _pruned(summary: SweepSummary) -> Iterator[tuple[int, str, str]]:
    for reason, members in grouped(summary.pruned):
        named = "; ".join(label(one.values) for one in members[:MOST_NAMED])
        more = f" and {len(members) - MOST_NAMED} more" if len(members) > MOST_NAMED else ""
        yield len(members), named + more, reason


def _shared(sweep: Sweep, folder: Path) -> Iterator[tuple[str, str]]:
    yield "run", {"local": "on one machine, one after another"}.get(sweep.where, "as job arrays")
    if sweep.given:
        yield "knobs", label(sweep.given)
    if sweep.words:
        yield "flags", " ".join(sweep.words)
    yield "directory", str(folder)
