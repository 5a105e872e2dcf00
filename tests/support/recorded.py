"""Run directories as a real run leaves them, written by the project's own writers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moe_bench.config.run import Origin, ResolvedRun, Setting, Substitution
from moe_bench.results.records import Event, ExpertLoad, StepRecord
from moe_bench.results.writer import RunWriter

START_UNIX_S = 1_790_000_000.0
NUM_EXPERTS = 8
NUM_LAYERS = 4
TOKENS_PER_STEP = 8 * 256


def write_manifest(
    run_dir: Path,
    *,
    model: str = "Tiny-Qwen3",
    knobs: Mapping[str, str] | None = None,
    args: Mapping[str, str] | None = None,
    rehearsal: bool = False,
    substitutions: tuple[Substitution, ...] = (),
) -> None:
    """`run.json` of a two-rank run; `knobs` and `args` add to the usual ones, as if from the command line."""
    usual_knobs = {"MODEL": model, "NNODES": "1", "GPUS_PER_NODE": "2", "EP": "2", "GBS": "8"}
    usual_args = {"--num-layers": str(NUM_LAYERS), "--num-experts": str(NUM_EXPERTS)}
    preset = Origin(layer="model", place=f"model_configs/benchmarking/{model}.yaml:12")
    given = Origin(layer="flag", place="command line")
    run = ResolvedRun(
        run_id=run_dir.name,
        model=model,
        run_dir=run_dir,
        knobs={name: Setting(value=value, origin=preset) for name, value in usual_knobs.items()}
        | {name: Setting(value=value, origin=given) for name, value in (knobs or {}).items()},
        env={"OMP_NUM_THREADS": Setting(value="1", origin=preset)},
        args={name: Setting(value=value, origin=preset) for name, value in usual_args.items()}
        | {name: Setting(value=value, origin=given) for name, value in (args or {}).items()},
        rehearsal=rehearsal,
        substitutions=substitutions,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_bytes(run.to_json())


def step_record(step: int, *, train_steps: int = 40, step_time_s: float = 0.5) -> StepRecord:
    """A plausible step: falling loss, uneven experts; the same for the same arguments."""
    chance = random.Random(step)
    return StepRecord(
        step=step,
        time_unix_s=START_UNIX_S + 12 + step * step_time_s,
        train_steps=train_steps,
        consumed_samples=8 * step,
        consumed_tokens=TOKENS_PER_STEP * step,
        losses={
            "lm loss": 5.6 * math.exp(-step / 30) + 3.1 + 0.05 * chance.random(),
            "load_balancing_loss": 1.05 + 0.02 * chance.random(),
        },
        grad_norm=1.0 + chance.random(),
        learning_rate=1e-3,
        step_time_s=step_time_s,
        tokens_per_s=TOKENS_PER_STEP / step_time_s,
        tflops_per_gpu=0.05 / step_time_s,
        memory_gib=(1.1, 1.25),
        expert_load=tuple(expert_load(layer, chance) for layer in range(1, NUM_LAYERS + 1)),
        timers_s={
            "forward-compute": 0.2 * step_time_s,
            "backward-compute": 0.5 * step_time_s,
            "optimizer": 0.1 * step_time_s,
        },
    )


def expert_load(layer: int, chance: random.Random) -> ExpertLoad:
    """One layer's load; layer 3 is the worst: its first expert gets three shares."""
    weights = [1 + 0.3 * chance.random() for _ in range(NUM_EXPERTS)]
    if layer == 3:
        weights[0] *= 3
    counts = tuple(round(2 * TOKENS_PER_STEP * weight / sum(weights)) for weight in weights)
    shares = [count / sum(counts) for count in counts]
    return ExpertLoad(
        layer=layer,
        max_over_mean=max(counts) * NUM_EXPERTS / sum(counts),
        entropy=-sum(p * math.log(p) for p in shares if p) / math.log(NUM_EXPERTS),
        dead_experts=counts.count(0),
        tokens_per_expert=counts,
    )


def write_run(
    run_dir: Path,
    *,
    num_steps: int = 40,
    step_time_s: float = 0.5,
    finished: bool = True,
    spike: int | None = None,
    start: Mapping[str, object] | None = None,
    **manifest: object,
) -> Path:
    """A whole run: manifest, events, steps (the first three slow, as first steps are; the loss of the step `spike` is 99). Returns `run_dir`."""
    write_manifest(run_dir, **manifest)
    writer = RunWriter(run_dir)
    say(writer, "phase", 0, phase="importing torch and Megatron")
    say(writer, "start", 8, **(dict(START_FIELDS) | dict(start or {})))
    say(writer, "embedding", 9, replaced=["torch.cuda.Stream", "torch.cuda.Event"])
    for step in range(1, num_steps + 1):
        slow = 4.0 if step <= 3 else 1.0 + 0.02 * (step % 5)
        record = step_record(step, train_steps=num_steps, step_time_s=slow * step_time_s)
        if step == spike:
            record = replace(record, losses={"lm loss": 99.0})
        writer.step(record)
    if finished:
        say(writer, "end", 60, outcome="completed", step=num_steps)
    writer.close()
    return run_dir


START_FIELDS: Mapping[str, object] = {
    "versions": {"torch": "2.11.0", "megatron-core": "0.19.2"},
    "device": "cpu",
    "world_size": 2,
    "flop_formula": "moe_bench/1",
    "routing_mode": "natural",
}


def say(writer: RunWriter, name: str, after_s: float, **fields: object) -> None:
    """Write one event, `after_s` seconds into the run."""
    writer.event(Event(event=name, time_unix_s=START_UNIX_S + after_s, fields=fields))
