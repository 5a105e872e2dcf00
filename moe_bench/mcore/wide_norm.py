"""Query and key norms over all heads at once, as in OLMoE; Megatron-Core 0.19's SelfAttention norms each head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_bench.mcore.cpu.sharding import Offsets, sharded_parameters


class AcrossHeadsNorm(torch.nn.Module):
    """RMS norm of [s, b, heads of this rank, channels] over all heads of all tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, heads: int, tp_group: Any) -> None:
        super().__init__()
        ranks = tp_group.size()
        if heads % ranks:
            raise ValueError(
                f"{heads} heads that share one norm do not divide over {ranks} tensor-parallel ranks"
            )
        self.eps = config.layernorm_epsilon
        self.width = heads * config.kv_channels
        self.tp_group = tp_group
        own = torch.ones(self.width // ranks, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(own)
        self.weight.tensor_model_parallel = ranks > 1
        self.weight.partition_dim = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed x, in x's dtype. Collective over the tensor-parallel group."""
        wide = x.float()
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        if (
            self.tp_group.size() > 1
        ):  # summed forward and, since every rank uses the sum, backward too
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        scale = self.weight.float().view(x.shape[-2:])
        return (wide * torch.rsqrt(squares / self.width + self.eps) * scale).to(x.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return the weight, cut by heads."""
        axes = {"weight": 0}
        return sharded_parameters(
            self, prefix, sharded_offsets, metadata, axes=axes, tp_group=self.tp_group
        )


def with_norms_across_heads(original: type) -> type:
    """Megatron's SelfAttention with such norms."""

    class AcrossHeadsSelfAttention(original):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            config, group = self.config, self.pg_collection.tp
            self.q_layernorm = AcrossHeadsNorm(config, config.num_attention_heads, group)
            self.k_layernorm = AcrossHeadsNorm(config, config.num_query_groups, group)

    return AcrossHeadsSelfAttention
