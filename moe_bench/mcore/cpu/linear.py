"""Linear layers in Transformer Engine's arrangement, built from Megatron's own tensor-parallel layers.

The arrangement matters because it decides the names in a checkpoint: a model trained on a CPU is then read by a
GPU run with Transformer Engine, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_bench.mcore.cpu.norm import normalize
from moe_bench.mcore.cpu.sharding import Offsets, sharded_parameters


def add_weight_gradient(
    input_: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
) -> None:
    """Add grad_output.T @ input_ to main_grad: `wgrad_gemm_accum_fp32` and `_fp16` of Apex's extension."""
    if main_grad.dtype == input_.dtype:
        main_grad.addmm_(grad_output.t(), input_)
    else:
        main_grad.add_(grad_output.t() @ input_)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer whose weight every tensor-parallel rank holds whole: `TELinear(parallel_mode="duplicated")`.

    With sequence parallelism it acts on this rank's part of the sequence, so its gradient is summed over the
    tensor-parallel group (the weight is marked `sequence_parallel`).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], object],
        bias: bool,
        skip_bias_add: bool,
        parallel_mode: str | None = "duplicated",
        **_: object,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("duplicated", None), f"{parallel_mode=} needs a parallel linear"
        self.skip_bias_add = skip_bias_add
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            init_method(self.weight)
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x @ weight.T and the bias still to be added, if any."""
        if self.skip_bias_add:
            return torch.nn.functional.linear(x, self.weight), self.bias
        return torch.nn.functional.linear(x, self.weight, self.bias), None

    def backward_dw(self) -> None:
        """Do nothing: the weight's gradient is never delayed here."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return the parameters, replicated over the tensor-parallel group."""
        return sharded_parameters(self, prefix, sharded_offsets, metadata)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """The norm and the linear layer after it in one module, as `TELayerNormColumnParallelLinear`.

    The norm's parameters are `layer_norm_weight` and `layer_norm_bias`. It normalizes this rank's part of the
    sequence before the gather, so it costs 1/tp of the work under sequence parallelism.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **options: object
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = 0.0 if self.zero_centered else 1.0
        self.layer_norm_weight = torch.nn.Parameter(
            torch.full((input_size,), start, dtype=config.params_dtype)
        )
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.layer_norm_bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(
                torch.zeros(input_size, dtype=config.params_dtype)
            )
            self.layer_norm_bias.sequence_parallel = config.sequence_parallel

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return this rank's columns of norm(input_) @ weight.T, and the bias still to be added."""
        normalized = normalize(
            input_,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            zero_centered=self.zero_centered,
        )
        return super().forward(normalized)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return weight and bias sharded over the tensor-parallel group and the norm replicated."""
        axes = {"weight": 0, "bias": 0}
        return sharded_parameters(
            self, prefix, sharded_offsets, metadata, axes=axes, tp_group=self.tp_group
        )
