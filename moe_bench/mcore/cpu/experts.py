"""Grouped experts on a CPU: one matrix product over all local experts at a time.

Letters in shapes: E local experts, T tokens routed to them (sorted by expert), I inputs, O outputs of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from moe_bench.mcore.cpu.sharding import Offsets


class GroupedLinear(torch.nn.Module):
    """The same linear layer of every local expert, their weights in one parameter [E, O, I].

    Stands in for `TEColumnParallelGroupedLinear` and `TERowParallelGroupedLinear`. The initial weights of all
    experts are drawn on every rank, which keeps its own: they do not depend on EP or ETP. Megatron's local experts
    (`SequentialMLP` with --use-cpu-initialization, 0.19.2) start as copies of one another across EP ranks.
    """

    split: Literal["column", "row"]

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], object],
        bias: bool,
        skip_bias_add: bool,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__()
        self.num_local_experts = num_local_experts
        self.skip_bias_add = skip_bias_add
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.stride = self.pieces(config)
        axis = 0 if self.split == "column" else 1
        shape = [output_size, input_size]
        shape[axis] //= self.tp_group.size()
        self.weight = torch.nn.Parameter(
            torch.empty(num_local_experts, *shape, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            draw_experts(
                self.weight.unbind(),
                init_method,
                (output_size, input_size),
                axis,
                self.stride,
                pg_collection,
            )
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(
                torch.zeros(num_local_experts, shape[0], dtype=config.params_dtype)
            )
        self._mark(config, axis)

    @staticmethod
    def pieces(config: TransformerConfig) -> int:
        """Return how many weights lie one after the other in this one, each split over the ranks."""
        del config
        return 1

    def _mark(self, config: TransformerConfig, axis: int) -> None:
        """Set the attributes by which Megatron's DDP and optimizer choose a parameter's groups."""
        own_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        for parameter in self.parameters():
            parameter.allreduce = not own_groups
        set_tensor_model_parallel_attributes(
            self.weight, is_parallel=True, dim=axis + 1, stride=self.stride
        )
        if self.bias is not None and self.split == "column":
            set_tensor_model_parallel_attributes(
                self.bias, is_parallel=True, dim=1, stride=self.stride
            )

    def forward(
        self, x: torch.Tensor, tokens_per_expert: Sequence[int]
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Return each token times its expert's weight, and the biases still to be added by expert.

        x: [T, I], sorted by expert; result: [T, O].
        """
        output = grouped_linear(x, self.weight, tokens_per_expert)
        if self.bias is None:
            return output, None
        if self.skip_bias_add:
            return output, list(self.bias.unbind())
        counts = torch.tensor(tokens_per_expert, device=x.device)
        return output + self.bias.repeat_interleave(counts, dim=0, output_size=x.shape[0]), None

    def backward_dw(self) -> None:
        """Do nothing: the weights' gradient is never delayed here."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return one factory a parameter, which cuts it into the experts' own tensors on disk."""
        raise NotImplementedError("GroupedMLP.sharded_state_dict lays the experts out")


class ColumnParallelGroupedLinear(GroupedLinear):
    """Experts' first layer: each expert-tensor-parallel rank holds part of the outputs."""

    split = "column"

    @staticmethod
    def pieces(config: TransformerConfig) -> int:
        """Return 2 when gate and up projection share the weight, else 1."""
        return 2 if config.gated_linear_unit else 1


class RowParallelGroupedLinear(GroupedLinear):
    """Experts' second layer: each expert-tensor-parallel rank holds part of the inputs."""

    split = "row"


class GroupedMLP(TEGroupedMLP):
    """Megatron's grouped experts over GroupedLinear; on disk the same keys and shapes as SequentialMLP's."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object,
        pg_collection: ProcessGroupCollection,
        **name: str | None,
    ) -> None:
        """`name`: a keyword since 0.18."""
        super().__init__(num_local_experts, config, submodules, pg_collection, **name)
        self.expert_dp_group = pg_collection.expt_dp
        self.plain_swiglu = is_plain_swiglu(config)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        **options: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the experts' outputs [T, h], weighted by the router, and no bias."""
        x = permuted_local_hidden_states
        if not self.plain_swiglu or permuted_probs.dtype != x.dtype:
            return super().forward(x, tokens_per_expert, permuted_probs, **options)
        counts = tokens_per_expert.tolist()
        gate_up, _ = self.linear_fc1(x, counts)
        return self.linear_fc2(weighted_swiglu(gate_up, permuted_probs.unsqueeze(-1)), counts)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return each parameter as a factory of the experts' tensors, under `experts.linear_fc1.weight` etc."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        assert not metadata.get("singleton_local_shards", False), (
            "singleton_local_shards is not supported by the CPU's grouped experts"
        )
        result: ShardedStateDict = {}
        for layer_name in ("linear_fc1", "linear_fc2"):
            layer = getattr(self, layer_name)
            for name, parameter in layer.named_parameters():
                key = f"{prefix}experts.{layer_name}.{name}"
                result[f"{prefix}{layer_name}.{name}"] = self._factory(
                    layer, parameter, key, sharded_offsets
                )
        return result

    def _factory(
        self, layer: GroupedLinear, parameter: torch.nn.Parameter, key: str, offsets: Offsets
    ) -> ShardedTensorFactory:
        """Return the factory that cuts parameter by expert, and a gated first layer into its two halves."""
        # The optimizer calls build_fn with its own tensors of the parameter's shape in place of the parameter.
        experts = self.num_local_experts
        first, total = layer.ep_group.rank() * experts, layer.ep_group.size() * experts
        tp_rank, tp_size = layer.tp_group.rank(), layer.tp_group.size()
        axis = getattr(parameter, "partition_dim", -1) if tp_size > 1 else -1
        pieces = layer.stride
        shared_by_tp = tp_rank if axis < 0 else 0
        dp_rank = self.expert_dp_group.rank()

        @torch.no_grad()
        def build(
            key: str, tensor: torch.Tensor, replica_id: object, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            assert flattened_range is None, "flattened optimizer shards have no expert axis"
            built = []
            for local in range(experts):
                outer = (*offsets, (len(offsets), first + local, total))
                for piece, part in enumerate(tensor[local].chunk(pieces, dim=0)):
                    inner = _inner_offset(axis, tp_rank, tp_size, piece, pieces, len(outer))
                    built.append(
                        ShardedTensor.from_rank_offsets(
                            key,
                            part,
                            *outer,
                            *inner,
                            replica_id=replica_id,
                            prepend_axis_num=len(outer),
                        )
                    )
            return built

        @torch.no_grad()
        def merge(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts).view(experts, -1, *parts[0].shape[1:])

        return ShardedTensorFactory(key, parameter, build, merge, (0, shared_by_tp, dp_rank))


class SequentialExperts(SequentialMLP):
    """Megatron's experts one after the other, starting from the same weights as the grouped ones."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object,
        pg_collection: ProcessGroupCollection,
        **name: str | None,
    ) -> None:
        """`name`: a keyword since 0.18."""
        with torch.random.fork_rng(devices=[]):  # what it draws depends on EP, and is replaced
            super().__init__(num_local_experts, config, submodules, pg_collection, **name)
        if not config.perform_initialization:
            return
        parts = pg_collection.expt_tp.size()
        gate_and_up = ColumnParallelGroupedLinear.pieces(config)
        for layer_name, init_method, axis, stride in (
            ("linear_fc1", config.init_method, 0, gate_and_up),
            ("linear_fc2", config.output_layer_init_method, 1, 1),
        ):
            weights = [getattr(expert, layer_name).weight for expert in self.local_experts]
            shape = list(weights[0].shape)
            shape[axis] *= parts
            draw_experts(weights, init_method, (shape[0], shape[1]), axis, stride, pg_collection)


@torch.no_grad()
def draw_experts(
    weights: Sequence[torch.Tensor],
    init_method: Callable[[torch.Tensor], object],
    shape: tuple[int, int],
    axis: int,
    stride: int,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Draw every expert's whole weight of that shape in turn; keep this rank's part of its own experts.

    axis is the one split over the expert-tensor-parallel ranks, stride how many weights lie along it.
    """
    parts, part = pg_collection.expt_tp.size(), pg_collection.expt_tp.rank()
    first = pg_collection.ep.rank() * len(weights)
    for expert_id in range(len(weights) * pg_collection.ep.size()):
        whole = torch.empty(shape)
        init_method(whole)
        if first <= expert_id < first + len(weights):
            pieces = whole.chunk(parts * stride, dim=axis)[part::parts]
            weights[expert_id - first].copy_(torch.cat(pieces, dim=axis))


def is_plain_swiglu(config: TransformerConfig) -> bool:
    """Return whether experts compute silu(gate) * up with nothing around it."""
    recomputed = config.recompute_granularity == "selective" and (
        "moe_act" in config.recompute_modules
    )
    return (
        config.gated_linear_unit
        and config.activation_func == F.silu
        and not config.add_bias_linear
        and not config.glu_linear_offset
        and config.activation_func_clamp_value is None
        and getattr(config, "moe_mlp_glu_interleave_size", None) is None  # since 0.18
        and not config.moe_apply_probs_on_input
        and not config.fine_grained_activation_offloading
        and not recomputed
    )


def _inner_offset(
    axis: int, tp_rank: int, tp_size: int, piece: int, pieces: int, outer: int
) -> list[tuple[int, int, int]]:
    """Return where one expert's part lies in its whole tensor, as Megatron's (axis, position, parts).

    axis counts the expert axis: 1 for outputs, 2 for inputs, negative when the tensor is not split over ranks.
    """
    if axis > 1:
        return [(axis - 1 + outer, tp_rank, tp_size)]
    ranks = tp_size if axis == 1 else 1
    position = piece * ranks + (tp_rank if axis == 1 else 0)
    return [(outer, position, ranks * pieces)] if ranks * pieces > 1 else []


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: Sequence[int]
) -> torch.Tensor:
    """Return x[t] @ weight[expert of t].T; x: [T, I] sorted by expert, weight: [E, O, I] -> [T, O]."""
    return _GroupedLinear.apply(x, weight, tuple(tokens_per_expert))


class _GroupedLinear(torch.autograd.Function):
    """One product an expert, each written where it belongs: no slice is copied and nothing concatenated.

    torch 2.11's `grouped_mm` loops over the experts on a CPU as well, but materializes its transposed operands.
    The weight's gradient is added to Megatron's `main_grad` in place when DDP has provided one, as Megatron's
    own linear layer does with gradient_accumulation_fusion (tensor_parallel/layers.py, 0.19.2).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.tokens_per_expert = weight, tokens_per_expert
        output = x.new_empty(x.shape[0], weight.shape[1])
        parts = zip(*_by_expert(tokens_per_expert, x, output), weight.mT.unbind(), strict=True)
        for x_part, output_part, matrix in parts:
            torch.mm(x_part, matrix, out=output_part)
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            parts = zip(
                *_by_expert(ctx.tokens_per_expert, grad, grad_x), weight.unbind(), strict=True
            )
            for grad_part, grad_x_part, matrix in parts:
                torch.mm(grad_part, matrix, out=grad_x_part)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, _weight_gradient(ctx.weight, grad, x, ctx.tokens_per_expert), None


def _by_expert(
    tokens_per_expert: tuple[int, ...], *tensors: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each tensor [T, ...] as one view an expert: cheaper than a slice each."""
    return (tensor.split(tokens_per_expert) for tensor in tensors)


def _weight_gradient(
    weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, tokens_per_expert: tuple[int, ...]
) -> torch.Tensor:
    """Return the gradient [E, O, I], or an unwritten tensor when it was added to weight.main_grad."""
    in_place = hasattr(weight, "grad_added_to_main_grad")
    main_grad: torch.Tensor | None = getattr(weight, "main_grad", None) if in_place else None
    result = torch.zeros_like(weight) if main_grad is None else main_grad
    parts = zip(*_by_expert(tokens_per_expert, grad, x), result.unbind(), strict=True)
    for grad_part, x_part, total in parts:
        if not grad_part.shape[0]:
            continue
        if total.dtype == grad_part.dtype:
            total.addmm_(grad_part.t(), x_part)
        else:
            total.add_(grad_part.t() @ x_part)
    if main_grad is None:
        return result
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def weighted_swiglu(gate_up: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up * probability; gate_up: [T, 2F], probabilities: [T, 1] of the same dtype -> [T, F]."""
    return _WeightedSwiglu.apply(gate_up, probabilities)


class _WeightedSwiglu(torch.autograd.Function):
    """The composite's own operations in its own order (bitwise equal), with one intermediate tensor kept."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, probabilities, activated)
        return (activated * up).mul_(probabilities)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, probabilities, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        weighted = grad * probabilities
        torch.mul(weighted, activated, out=grad_up)
        weighted.mul_(up)
        torch.ops.aten.silu_backward.grad_input(weighted, gate, grad_input=grad_gate)
        products = torch.mul(activated, up, out=weighted)
        return result, products.mul_(grad).sum(dim=-1, keepdim=True)
