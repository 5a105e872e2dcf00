"""Memory that a rank's weights, gradients and optimizer states take: estimated. Pure.

Not counted: activations, communication buffers, CUDA graphs, the allocator's waste and the CUDA context. So a layout
that does not fit here never fits, and one that does may still not.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.arguments.sizes import Sizes, pipeline_of
from moe_bench.config.run import ResolvedRun
from moe_bench.planner import params
from moe_bench.planner.architecture import Architecture
from moe_bench.topology.pipeline import Stage
from moe_bench.units import GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStates:
    """Estimated bytes on one rank of a pipeline stage."""

    pp_rank: int
    weights: float
    gradients: float
    optimizer: float

    @property
    def gib(self) -> float:
        """All three, in GiB."""
        return (self.weights + self.gradients + self.optimizer) / GIB


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bytes:
    """Bytes that one parameter takes."""

    weight: float
    gradient: float
    optimizer: float


def states(run: ResolvedRun) -> tuple[ModelStates, ...]:
    """For each pipeline stage, one rank's share. Raises ConfigError for sizes that do not divide."""
    arch, sizes = Architecture.of(run.args), Sizes.of(run)
    each = _bytes_per_parameter(run)
    sharded = run.args.get("--use-distributed-optimizer") is not None
    world, pp = sizes.world.number, sizes.pp.number
    expert_shards = sizes.ep.number * sizes.etp.number
    data_ranks = world // (sizes.tp.number * pp) if sharded else 1
    expert_data_ranks = world // (expert_shards * pp) if sharded else 1
    found = []
    for pp_rank in range(pp):
        stages = [stage for stage in pipeline_of(run).stages if stage.pp_rank == pp_rank]
        total = sum(_parameters(arch, stage) for stage in stages)
        experts = sum(_expert_parameters(arch, stage) for stage in stages)
        dense_here = (total - experts) / sizes.tp.number
        experts_here = experts / expert_shards
        here = dense_here + experts_here
        found.append(
            ModelStates(
                pp_rank=pp_rank,
                weights=each.weight * here,
                gradients=each.gradient * here,
                optimizer=each.optimizer
                * (dense_here / data_ranks + experts_here / expert_data_ranks),
            )
        )
    return tuple(found)


def _bytes_per_parameter(run: ResolvedRun) -> _Bytes:
    """Adam: in fp32 two moments; in bf16 an fp32 copy of the weights besides; fp32 gradients either way.

    The precision-aware optimizer keeps moments in the given types and weights in fp32 or less.
    """
    if "--bf16" not in run.args and "--fp16" not in run.args:
        return _Bytes(weight=4, gradient=4, optimizer=8)
    size = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    names = ("--main-params-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype")
    kept = [run.args[name].value if name in run.args else "fp32" for name in names]
    weight = 1 if "--fp8-param-gather" in run.args else 2
    return _Bytes(weight=weight, gradient=4, optimizer=sum(size.get(one, 4) for one in kept))


def _parameters(arch: Architecture, stage: Stage) -> int:
    found = sum(params.layer(arch, number - 1) for number in stage.layers)
    found += stage.mtp_layers * params.mtp_module(arch)
    rows = arch.vocab * arch.hidden
    if stage.embedding or stage.mtp_layers:
        found += rows
    if stage.loss:
        found += arch.hidden + (rows if not arch.tied or not stage.embedding else 0)
    return found


def _expert_parameters(arch: Architecture, stage: Stage) -> int:
    if arch.experts is None:
        return 0
    each = arch.experts.count * params.mlp(arch, arch.experts.width)
    layers = sum(arch.is_expert_layer[number - 1] for number in stage.layers)
    return each * (layers + stage.mtp_layers * arch.is_expert_layer[-1])
