"""Would Megatron start this run? Its own parser and validation, for the whole job, here and now."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.arguments import emit
from moe_bench.arguments.schema import FlagSchema
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.mcore.cpu.embedding import install
from moe_bench.mcore.preflight import Accepted, assumed, load, validate
from moe_bench.mcore.validation import Refusal
from moe_bench.runtime.rank import hide_gpus

_WORD = re.compile(r"--[a-z0-9-]+|[A-Za-z_][A-Za-z0-9_]{2,}")
ELSEWHERE = {
    "fp8": "--fp8-format", "fp4": "--fp4-format", "num_moe_experts": "--num-experts", "fp8_param": "--fp8-param-gather",
    "num_layers_in_first_pipeline_stage": "--decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "--decoder-last-pipeline-num-layers",
    "virtual_pipeline_model_parallel_size": "--num-virtual-stages-per-pipeline-rank",
    "layernorm_epsilon": "--norm-epsilon", "num_stages": "--pipeline-model-parallel-layout",
}  # fmt: skip
"""Names in Megatron's messages that are no flag's own -> the flag they come from."""

_MODEL_SIZES = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
}  # fmt: skip
"""What Megatron's total_model_size multiplies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The machine that is to run it."""

    compute: tuple[int, int]
    """Compute capability of its GPUs."""
    transformer_engine: str
    """Version assumed where none is installed here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What Megatron says of one run."""

    run: ResolvedRun
    world_size: int
    rank: int
    """The rank that refused, or the last one asked."""
    answer: Accepted | Refusal
    blamed: tuple[tuple[str, Setting], ...]
    """Flags that the refusal names, as the user set them."""
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether every rank asked was accepted."""
        return isinstance(self.answer, Accepted)


def prepare(megatron_path: Path | None) -> tuple[str, str]:
    """Embed and import Megatron, once a process: the embedding's line for the log, and Megatron's version.

    Raises ArgumentsError where this machine cannot import it.
    """
    if megatron_path is not None:
        sys.path.insert(0, str(megatron_path))
    hide_gpus()
    said = install().summary()
    return said, load()


def ask(
    run: ResolvedRun,
    schema: FlagSchema,
    target: Target,
    world_size: int,
    ranks: Sequence[int] = (),
) -> Verdict:
    """Ask Megatron about these ranks, or the first, a middle and the last. `prepare` must have been called."""
    started = time.perf_counter()
    argv = emit.argv(run)
    answer: Accepted | Refusal | None = None
    rank = 0
    for rank in ranks or sorted({0, world_size // 2, world_size - 1}):
        variables = {name: setting.value for name, setting in run.env.items()}
        job = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
        with (
            _environment(variables | job),
            assumed(transformer_engine=target.transformer_engine, compute=target.compute),
        ):
            answer = validate(argv)
        if isinstance(answer, Refusal):
            break
    assert answer is not None, "a job has at least one rank"
    return Verdict(
        run=run,
        world_size=world_size,
        rank=rank,
        answer=answer,
        blamed=blamed(run, schema, answer) if isinstance(answer, Refusal) else (),
        seconds=time.perf_counter() - started,
    )


def blamed(
    run: ResolvedRun, schema: FlagSchema, refusal: Refusal
) -> tuple[tuple[str, Setting], ...]:
    """The run's flags that a refusal's words or source line name, in argv order."""
    named = set(_WORD.findall(f"{refusal.message} {refusal.source}"))
    named |= {flag for word, flag in ELSEWHERE.items() if word in named}
    if "total_model_size" in named:
        named |= _MODEL_SIZES
    found: list[tuple[str, Setting]] = []
    for flag, setting in run.args.items():
        spec = schema.flags.get(flag)
        if flag in named or (spec is not None and spec.dest in named):
            found.append((flag, setting))
    return tuple(found)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The variables in this process's environment, which Megatron reads, within the block."""
    here = os.environ  # noqa: TID251 - Megatron's validation reads the process environment of the rank it speaks for
    before = dict(here)
    here.update(variables)
    try:
        yield
    finally:
        here.clear()
        here.update(before)
