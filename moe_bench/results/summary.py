"""A run in figures: its steady state, its losses, its balance, and everything that qualifies them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.distribution import Distribution, distribution
from moe_bench.results.manifest import Manifest, Substituted, Value, read_manifest
from moe_bench.results.reader import Records, read_events, read_steps
from moe_bench.results.records import Event, StepBalance
from moe_bench.results.state import State, standing

SMALLEST_WARMUP = 3
LARGEST_WARMUP = 20
WARMUP_SHARE = 0.1
WARMUP_RULE = (
    f"the first {100 * WARMUP_SHARE:.0f} % of a start's steps, at least {SMALLEST_WARMUP}, "
    f"at most {LARGEST_WARMUP}, are warm-up; so are those after each restart"
)
NOT_THE_REAL_MODEL = "NOT THE REAL MODEL"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCourse:
    """One loss from the first step to the last; None stands for NaN and infinity."""

    first: float | None
    last: float | None
    smallest: float | None
    last_steps_mean: float | None
    """Over the last 10 steps, or as many as there are; None when one of them is not finite."""
    num_not_finite: int
    """Steps whose loss was NaN or infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """How evenly tokens went to experts in the measured steps."""

    worst_layer: int
    worst_max_over_mean: float
    """Mean over steps, in the worst layer."""
    mean_max_over_mean: float
    """Mean over steps and layers."""
    mean_entropy: float
    dead_experts: int
    """Most experts of one layer without a token in a step."""
    dead_layer: int | None
    """The layer of `dead_experts`; None when no expert was dead."""
    dropped_tokens: int
    """Assignments dropped by the capacity factor, over all layers and steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All that `summarize` shows; `msgspec.json` writes it as it is."""

    run_id: str
    model: str
    run_dir: str
    state: State
    rehearsal: bool
    """True: a shrunken stand-in, NOT THE REAL MODEL."""
    substitutions: tuple[Substituted, ...]
    routing_mode: str
    """natural, forced-random, forced-biased, ...: results of different modes are different workloads."""
    device: str | None
    world_size: int | None
    versions: Mapping[str, str]
    flop_formula: str | None
    num_steps: int
    first_step: int | None
    """1-based; more than 1 where the run went on from a checkpoint."""
    train_steps: int | None
    skipped_steps: int
    warmup_steps: int
    warmup_rule: str
    steady: bool
    """False when every step fell into the warm-up: the figures then cover all steps, and say little."""
    step_time_s: Distribution | None
    tokens_per_s: Distribution | None
    tokens_per_s_per_rank: Distribution | None
    tflops_per_gpu: Distribution | None
    timers_s: Mapping[str, float]
    """Median of each of Megatron's timers over the measured steps."""
    losses: Mapping[str, LossCourse]
    grad_norm: Distribution | None
    memory_gib: tuple[float, ...]
    """By rank: the largest of all steps."""
    balance: Balance | None
    startup_s: float | None
    """From the start of the ranks' launcher to the end of the first step: imports included, queues not."""
    checkpoints: tuple[str, ...]
    """Paths, in the order saved."""
    warnings: tuple[str, ...]
    errors: tuple[str, ...]
    notes: tuple[str, ...]
    attempts: int
    """Starts of the training: 1, and one for each restart."""
    rolled_back_steps: int
    """Steps lost to a restart and made again."""
    torn_records: tuple[str, ...]
    """Places of records that a killed process left unfinished."""


def summarize(run_dir: Path) -> Summary:
    """Read and summarise a run. Raises RecordError."""
    manifest = read_manifest(run_dir)
    steps = read_steps(run_dir)
    events = read_events(run_dir)
    return summary_of(
        manifest, steps=steps, events=events, run_dir=run_dir, state=standing(run_dir).state
    )


def summary_of(
    manifest: Manifest,
    *,
    steps: Records[StepBalance],
    events: Records[Event],
    run_dir: Path,
    state: State,
) -> Summary:
    """The same from records already read."""
    records = steps.records
    measured = steady_steps(records, attempt_starts=steps.attempt_starts)
    start = start_fields(events.records)
    world_size = start_world_size(start, manifest)
    tokens_per_s = [step.tokens_per_s for step in measured or records]
    return Summary(
        run_id=manifest.run_id,
        model=manifest.model,
        run_dir=str(run_dir),
        state=state,
        rehearsal=manifest.rehearsal,
        substitutions=manifest.substitutions,
        routing_mode=routing_mode(start, manifest.args),
        device=_text(start.get("device")),
        world_size=world_size,
        versions=_versions(start),
        flop_formula=_text(start.get("flop_formula")),
        num_steps=len(records),
        first_step=records[0].step if records else None,
        train_steps=records[-1].train_steps if records else None,
        skipped_steps=sum(step.skipped for step in records),
        warmup_steps=len(records) - len(measured) if measured else 0,
        warmup_rule=WARMUP_RULE,
        steady=bool(measured),
        step_time_s=distribution([step.step_time_s for step in measured or records]),
        tokens_per_s=distribution(tokens_per_s),
        tokens_per_s_per_rank=(
            distribution([value / world_size for value in tokens_per_s]) if world_size else None
        ),
        tflops_per_gpu=distribution([step.tflops_per_gpu for step in measured or records]),
        timers_s=_timers(measured or records),
        losses=_losses(records),
        grad_norm=distribution(
            [step.grad_norm for step in measured or records if step.grad_norm is not None]
        ),
        memory_gib=_memory(records),
        balance=_balance(measured or records),
        startup_s=_startup_s(events.records, records),
        checkpoints=_said(events.records, "checkpoint_saved", "path"),
        warnings=_said(events.records, "warning", "message"),
        errors=_said(events.records, "error", "message"),
        notes=manifest.notes,
        attempts=len(steps.attempt_starts),
        rolled_back_steps=steps.rolled_back,
        torn_records=steps.torn + events.torn,
    )


def steady_steps(
    records: Sequence[StepBalance], *, attempt_starts: Sequence[int]
) -> tuple[StepBalance, ...]:
    """The steps after warm-up, by WARMUP_RULE; empty when there are none."""
    starts = attempt_starts or (0,)
    kept: list[StepBalance] = []
    for begin, end in zip(starts, [*starts[1:], len(records)], strict=True):
        kept.extend(records[begin + warmup_length(end - begin) : end])
    return tuple(kept)


def warmup_length(num_steps: int) -> int:
    """Of a start that made `num_steps` steps."""
    return min(max(SMALLEST_WARMUP, round(WARMUP_SHARE * num_steps)), LARGEST_WARMUP)


def start_fields(events: Sequence[Event]) -> Mapping[str, object]:
    """Of the last `start` event; empty when the run wrote none."""
    return next((event.fields for event in reversed(events) if event.event == "start"), {})


def start_world_size(start: Mapping[str, object], manifest: Manifest) -> int | None:
    """As the ranks counted it, else as it was resolved."""
    counted = start.get("world_size")
    return counted if isinstance(counted, int) else manifest.world_size


def routing_mode(start: Mapping[str, object], args: Mapping[str, Value]) -> str:
    """As the run said, else as Megatron's flags decide it."""
    said = start.get("routing_mode")
    if isinstance(said, str):
        return said
    if "--moe-router-force-load-balancing" in args:
        return "forced-random"
    if "--moe-router-force-biased" in args:
        return "forced-biased"
    return "natural"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _versions(start: Mapping[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for field, ending in (("versions", ""), ("commits", " commit")):
        said = start.get(field)
        if isinstance(said, Mapping):
            found |= {f"{name}{ending}": str(version) for name, version in said.items()}
    return found


def _timers(steps: Sequence[StepBalance]) -> dict[str, float]:
    names = dict.fromkeys(name for step in steps for name in step.timers_s)
    return {
        name: statistics.median(step.timers_s[name] for step in steps if name in step.timers_s)
        for name in names
    }


def _losses(steps: Sequence[StepBalance]) -> dict[str, LossCourse]:
    names = dict.fromkeys(name for step in steps for name in step.losses)
    return {
        name: _loss_course([step.losses[name] for step in steps if name in step.losses])
        for name in names
    }


def _loss_course(values: Sequence[float | None]) -> LossCourse:
    finite = [value for value in values if value is not None]
    last = [value for value in values[-10:] if value is not None]
    return LossCourse(
        first=values[0],
        last=values[-1],
        smallest=min(finite, default=None),
        last_steps_mean=statistics.fmean(last) if len(last) == len(values[-10:]) else None,
        num_not_finite=len(values) - len(finite),
    )


def _memory(steps: Sequence[StepBalance]) -> tuple[float, ...]:
    ranks = max((len(step.memory_gib) for step in steps), default=0)
    return tuple(
        max(step.memory_gib[rank] for step in steps if rank < len(step.memory_gib))
        for rank in range(ranks)
    )


def _balance(steps: Sequence[StepBalance]) -> Balance | None:
    by_layer: dict[int, list[float]] = {}
    for step in steps:
        for load in step.expert_load:
            by_layer.setdefault(load.layer, []).append(load.max_over_mean)
    if not by_layer:
        return None
    means = {layer: statistics.fmean(values) for layer, values in by_layer.items()}
    worst = max(means, key=means.__getitem__)
    loads = [load for step in steps for load in step.expert_load]
    deadest = max(loads, key=lambda load: load.dead_experts)
    return Balance(
        worst_layer=worst,
        worst_max_over_mean=means[worst],
        mean_max_over_mean=statistics.fmean(means.values()),
        mean_entropy=statistics.fmean(load.entropy for load in loads),
        dead_experts=deadest.dead_experts,
        dead_layer=deadest.layer if deadest.dead_experts else None,
        dropped_tokens=sum(load.dropped_tokens for load in loads),
    )


def _startup_s(events: Sequence[Event], steps: Sequence[StepBalance]) -> float | None:
    """Of the start of the training that made the first of `steps`: one before it may have come to nothing."""
    if not steps:
        return None
    first = steps[0].time_unix_s
    starts = [e for e in events if e.event == "start" and e.time_unix_s <= first]
    began = starts[-1].fields.get("began_unix_s") if starts else None
    return first - began if isinstance(began, float) else None


def _said(events: Sequence[Event], name: str, field: str) -> tuple[str, ...]:
    """What events of this name said, each thing once."""
    said = (str(event.fields.get(field, "")) for event in events if event.event == name)
    return tuple(dict.fromkeys(said))
