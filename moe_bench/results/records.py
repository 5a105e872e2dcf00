"""What a run writes down: one JSON object a line, append-only, tagged by kind.

`results/steps.jsonl` holds StepRecord lines, `results/events.jsonl` Event lines. Both are the truth; TensorBoard,
W&B and the report mirror them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STEPS_FILE = "results/steps.jsonl"
EVENTS_FILE = "results/events.jsonl"
"""Of rank 0; see `events_file` for the others."""

STEPS_LEFT_FILE = "results/steps-left"
"""There when a signal ended the training with steps left, after a checkpoint where one is saved: requeue."""

STOP_FILE = "results/stop"
"""There once the ranks have been asked to stop: rank 0 looks after each step, each rank before the first one."""

LM_LOSS = "lm loss"
"""Megatron's name of the loss that is shown."""

FORMAT_VERSION = 1
"""Of the lines below. Raised when a field changes its meaning or goes; a new field with a default does not raise it."""


def events_file(writer: int | str) -> str:
    """The events file of a rank other than 0, or of a writer that is no rank ("launcher")."""
    name = f"rank-{writer}" if isinstance(writer, int) else writer
    return f"results/events-{name}.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """First line of each file, and again whenever a writer opens it to append (a restart)."""

    format: str
    """"steps" or "events"."""
    version: int
    time_unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadBalance:
    """How evenly one layer's router spread a step's tokens over its experts."""

    layer: int
    """1-based, as Megatron counts; MTP layers follow the decoder's."""
    max_over_mean: float
    """Tokens of the busiest expert over the mean; 1.0 is perfect balance."""
    entropy: float
    """Entropy of the load over log(num_experts): 1.0 is uniform, 0.0 one expert."""
    dead_experts: int
    """Experts that received no token in this step."""
    dropped_tokens: int = 0
    """Assignments dropped by the capacity factor; 0 when dropless."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad(LoadBalance):
    """The balance of one layer with the counts behind it."""

    tokens_per_expert: tuple[int, ...]
    """Assignments (tokens x top-k) to each expert, summed over the whole global batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step, without its experts: what most readers need."""

    step: int
    """1-based; Megatron's iteration."""
    time_unix_s: float
    train_steps: int
    """Steps this run will make in all."""
    consumed_samples: int
    consumed_tokens: int
    losses: Mapping[str, float | None]
    """By Megatron's name: "lm loss", "load_balancing_loss", "mtp_1 loss", ...; "lm loss" is the one shown.
    JSON has no NaN: where a loss is not finite, None stands here and `not_finite` says what it was."""
    grad_norm: float | None
    """None on a skipped step, and when it is not finite."""
    learning_rate: float
    step_time_s: float
    tokens_per_s: float
    """Of the whole job."""
    tflops_per_gpu: float
    """By the formula named in the run's `start` event."""
    skipped: bool = False
    """True when the optimizer step was skipped (overflow or NaN)."""
    memory_gib: tuple[float, ...] = ()
    """By rank: peak allocated on the GPU, or resident set of the process on a CPU."""
    timers_s: Mapping[str, float] = field(default_factory=dict)
    """Megatron's timers of this step (forward-compute, optimizer, ...), max over ranks."""
    gpus: tuple[GpuSample, ...] = ()
    not_finite: Mapping[str, str] = field(default_factory=dict)
    """By loss, or "grad_norm": "nan", "inf" or "-inf", which stand as None above."""

    @property
    def loss(self) -> float | None:
        """The "lm loss"; None on a step that has none or where it is not finite."""
        return self.losses.get(LM_LOSS)

    @property
    def peak_memory_gib(self) -> float | None:
        """Of the rank that used most; None when memory was not measured."""
        return max(self.memory_gib, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(Step):
    """One optimizer step as it is written."""

    expert_load: tuple[ExpertLoad, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBalance(Step):
    """One optimizer step as it is read where the count of each expert is not needed (it is most of a line)."""

    expert_load: tuple[LoadBalance, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSample:
    """NVML's view of one GPU at one step; None for what this GPU does not tell (power of a MIG instance, say)."""

    rank: int
    power_w: float | None
    sm_clock_mhz: float | None
    utilization: float | None
    """0 to 1."""
    memory_used_gib: float | None


def told(gpus: Sequence[GpuSample], figure: str) -> list[float]:
    """That figure of every GPU that tells it."""
    return [value for gpu in gpus if (value := getattr(gpu, figure)) is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened once."""

    event: str
    """start, embedding, checkpoint_saved, checkpoint_loaded, evaluation, profile, wandb, warning, error, end, ..."""
    time_unix_s: float
    rank: int = 0
    fields: Mapping[str, object] = field(default_factory=dict)
    """JSON values. The names below are what `summarize`, `compare`, `report` and the live display look for; others
    are kept and shown as they are.

    phase: phase (str, what happens now, before the first step: "importing Megatron")
    start: versions ({package: version}), device (str), world_size, flop_formula (str, with its version),
        routing_mode ("natural", "forced-random", "forced-biased", ...), commits ({"moe_bench": commit, ...}), hostname,
        processor, began_unix_s (when rank 0, or the agent above it, started), num_parameters, num_active_parameters, threads_per_rank
    embedding: replaced (list of str)
    checkpoint_saved: step, path (of that step's folder), duration_s
    checkpoint_loaded: step, path (of the folder that --load names), duration_s
    evaluation: step, split, losses ({name: value})
    profile: path, kind
    wandb: mode, url or path
    warning: message
    error: message, traceback (optional); of the launcher: failed_rank (the first that failed), log, tail
    end: outcome ("completed", "stopped", "failed"), step, reason (optional)
    """
