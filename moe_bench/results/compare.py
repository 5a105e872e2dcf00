"""Two or more runs side by side: what differs between them, and by how much one is faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.distribution import Distribution
from moe_bench.results.manifest import Manifest, Value, read_manifest
from moe_bench.results.reader import read_events
from moe_bench.results.summary import NOT_THE_REAL_MODEL, Summary, start_fields, summarize

WORK_FLAGS = (
    "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--num-query-groups",
    "--kv-channels", "--num-experts", "--moe-router-topk", "--moe-ffn-hidden-size",
    "--moe-shared-expert-intermediate-size", "--moe-layer-freq", "--mtp-num-layers", "--seq-length",
    "--q-lora-rank", "--kv-lora-rank", "--multi-latent-attention",
)  # fmt: skip
"""Flags that decide how much work a token is: runs that differ in one are not the same workload."""

_NAMES = frozenset({"RUN_ID", "MOE_BENCH_RUN_ID"})
"""What a run is called is no difference of what it does."""

RATIO_RULE = "ratio of the medians; its bounds divide the ends of the two 95 % intervals, so they hold with at least 90 %"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing that is not the same in all runs."""

    kind: str
    """knob, flag, env, version, or record (what the ranks found: device, routing mode, ...)."""
    name: str
    values: tuple[str | None, ...]
    """By run; None where the run does not have it."""
    places: tuple[str | None, ...]
    """By run: where the value was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How a run's median tokens/s stands to the first run's."""

    ratio: float
    bounds: tuple[float, float] | None
    """By RATIO_RULE; None when a run has too few steps for an interval."""

    @property
    def conclusive(self) -> bool:
        """True when the bounds leave out 1."""
        return self.bounds is not None and not self.bounds[0] <= 1.0 <= self.bounds[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Runs in the order given; the first is what the others are measured against."""

    summaries: tuple[Summary, ...]
    differences: tuple[Difference, ...]
    tokens_per_s: tuple[Ratio | None, ...]
    """By run, against the first; None where one of the two measured nothing."""
    not_ranked_because: tuple[tuple[str, ...], ...]
    """By run: why it must not be ranked against the first; empty when it may."""


def compare(run_dirs: Sequence[Path]) -> Comparison:
    """Read the runs and compare each with the first. Raises RecordError."""
    summaries = tuple(summarize(run_dir) for run_dir in run_dirs)
    manifests = [read_manifest(run_dir) for run_dir in run_dirs]
    starts = [start_fields(read_events(run_dir).records) for run_dir in run_dirs]
    first = summaries[0]
    return Comparison(
        summaries=summaries,
        differences=tuple(_differences(manifests, summaries, starts)),
        tokens_per_s=tuple(ratio(first.tokens_per_s, s.tokens_per_s) for s in summaries),
        not_ranked_because=tuple(
            tuple(obstacles(first, other, manifests[0], manifest))
            for other, manifest in zip(summaries, manifests, strict=True)
        ),
    )


def ratio(base: Distribution | None, other: Distribution | None) -> Ratio | None:
    """`other` over `base`; None when one of them is missing or the base is 0."""
    if base is None or other is None or base.median <= 0:
        return None
    bounds = None
    if base.interval and other.interval and base.interval[0] > 0:
        bounds = (other.interval[0] / base.interval[1], other.interval[1] / base.interval[0])
    return Ratio(ratio=other.median / base.median, bounds=bounds)


def _differences(
    manifests: Sequence[Manifest],
    summaries: Sequence[Summary],
    starts: Sequence[Mapping[str, object]],
) -> Iterator[Difference]:
    own_paths = [
        manifest.run_dir or summary.run_dir
        for manifest, summary in zip(manifests, summaries, strict=True)
    ]
    yield from _of_settings("knob", [m.knobs for m in manifests], own_paths)
    yield from _of_settings("flag", [m.args for m in manifests], own_paths)
    yield from _of_settings("env", [m.env for m in manifests], own_paths)
    yield from _of_values("version", [summary.versions for summary in summaries])
    found = [
        {
            "model": summary.model,
            "routing mode": summary.routing_mode,
            "rehearsal": str(summary.rehearsal).lower(),
        }
        | {name: str(value) for name, value in start.items() if _is_plain(name, value)}
        for summary, start in zip(summaries, starts, strict=True)
    ]
    yield from _of_values("record", found)


def _is_plain(name: str, value: object) -> bool:
    return name != "routing_mode" and isinstance(value, str | int | float | bool)


def _of_settings(
    kind: str, layers: Sequence[Mapping[str, Value]], own_paths: Sequence[str]
) -> Iterator[Difference]:
    for name in dict.fromkeys(name for layer in layers for name in layer if name not in _NAMES):
        settings = [layer.get(name) for layer in layers]
        values = [
            None if setting is None else setting.value.replace(own, "<run directory>")
            for setting, own in zip(settings, own_paths, strict=True)
        ]
        if len(set(values)) > 1:
            places = tuple(setting.origin.place if setting else None for setting in settings)
            yield Difference(kind=kind, name=name, values=tuple(values), places=places)


def _of_values(kind: str, sides: Sequence[Mapping[str, str]]) -> Iterator[Difference]:
    for name in dict.fromkeys(name for side in sides for name in side):
        values = tuple(side.get(name) for side in sides)
        if len(set(values)) > 1:
            yield Difference(kind=kind, name=name, values=values, places=(None,) * len(values))


def obstacles(
    first: Summary, other: Summary, first_manifest: Manifest, manifest: Manifest
) -> Iterator[str]:
    """Why the two must not be ranked against each other; nothing when they may."""
    yield from other_work(first, other, first_manifest, manifest)
    if other.rehearsal or first.rehearsal:
        yield stand_in(other)
    if cold := dict.fromkeys(one.run_id for one in (first, other) if not one.steady):
        yield f"no steps beyond the warm-up in {' and '.join(cold)}"


def stand_in(summary: Summary) -> str:
    """Why a rehearsal is not ranked."""
    return f"{NOT_THE_REAL_MODEL}: a rehearsal's speed says nothing of {summary.model}"


def other_work(
    first: Summary, other: Summary, first_manifest: Manifest, manifest: Manifest
) -> Iterator[str]:
    """What makes a token of the one another amount of work than a token of the other."""
    if other.model != first.model:
        yield f"another model: {other.model} against {first.model}"
    if other.routing_mode != first.routing_mode:
        yield (
            f"another routing mode: {other.routing_mode} against {first.routing_mode}, "
            "which are different workloads"
        )
    unlike = [
        f"{flag} {_shown(manifest.args.get(flag))} against {_shown(first_manifest.args.get(flag))}"
        for flag in WORK_FLAGS
        if _shown(manifest.args.get(flag)) != _shown(first_manifest.args.get(flag))
    ]
    if unlike and other.model == first.model:
        yield f"another amount of work for a token: {', '.join(unlike)}"


def _shown(setting: Value | None) -> str:
    return setting.value if setting else "unset"
